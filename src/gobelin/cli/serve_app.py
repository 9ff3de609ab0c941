"""The work of ``gobelin serve``: a socket, a model, and uvicorn until somebody stops it."""

import errno
import os
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from gobelin.allocator import limit_heaps
from gobelin.cli.open_and_paint import open_pipeline
from gobelin.cli.serve import Serve
from gobelin.errors import UsageError
from gobelin.server import ServerOptions, create_app
from gobelin.server.security import check_options
from gobelin.server.service import Service

_CONNECTIONS = 512  # at once; more are told that the server is busy
_HEAPS = 2  # for all threads; with glibc's 16 on two cores memory grows for minutes under load: docs/decisions.md
_STOP_SECONDS = 5  # for answers that are being sent
_IDLE_SECONDS = (
    30  # between two requests of a connection; with uvicorn's 5, a busy client often meets one that is closing
)


def serve(options: Serve) -> None:
    """Listen, open the model, print the address, and serve until Ctrl-C or SIGTERM."""
    limit_heaps(_HEAPS)
    token = options.token or os.environ.get("GOBELIN_TOKEN") or None
    server_options = ServerOptions(host=options.host, names=options.name, token=token, queue=options.queue)
    check_options(server_options)
    listening = listen(options.host, options.port)
    with listening:
        # Of what strangers write, nothing goes into the log; a job says itself what of its prompt was left out.
        warnings.filterwarnings("ignore", message="the prompt is longer|nothing in the mask", category=UserWarning)
        app = create_app(open_pipeline(options), server_options)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_STOP_SECONDS,
            timeout_keep_alive=_IDLE_SECONDS,
        )
        listening.listen()
        _, port = listening.getsockname()[:2]
        host = f"[{options.host}]" if ":" in options.host else options.host
        hint = "" if token is None else " (open it with /?token= and the token once)"
        print(f"Gobelin paints at http://{host}:{port}{hint}; Ctrl-C stops it", flush=True)
        StoppingServer(config, app.state.service).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; raises :class:`UsageError` for a port that is taken, and an address that is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError:
        raise UsageError(f"--host is {host}, which is no address of this machine: leave it out, or give one") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is taken: stop what listens there, or give another by --port") from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} may not be opened by this user: give one above 1023 by --port") from None
        raise UsageError(f"--host is {host}, which is no address of this machine: leave it out, or give one") from None


class StoppingServer(uvicorn.Server):
    """A server whose jobs end when it is told to stop, so that those who follow them do not hold it open."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Cancel all jobs, and stop."""
        self.should_exit = True
        if self._service.store.is_closed:  # told twice
            self.force_exit = True
        self._service.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at Ctrl-C and SIGTERM; both are the usual end of a server, and no error."""
        signals = [signal.SIGINT, signal.SIGTERM]
        before = {one: signal.signal(one, self.handle_exit) for one in signals}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
            sys.stderr.flush()
