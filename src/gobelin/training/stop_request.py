"""Requests to stop, SIGINT (Ctrl-C) and SIGTERM: heeded between two steps, when there is something whole to save.

Python handles signals in its main thread alone: in any other, nothing is caught.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gobelin.training import distributed


class StopRequest:
    """A request that came or may come."""

    def __init__(self) -> None:
        self.is_set = False
        self._interrupts = False

    def set(self) -> None:
        """Note the request; in a block that it may interrupt, raise KeyboardInterrupt."""
        self.is_set = True
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """End the block at once when the request comes: it takes long, and is to be run again when training goes on."""
        self._interrupts = True
        try:
            yield
        except KeyboardInterrupt:
            if not self.is_set:
                raise
        finally:
            self._interrupts = False


@contextmanager
def caught_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM as a request. In a lone process, a second one is handled as it was before."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: object) -> None:
        if not distributed.is_torchrun():  # torchrun may pass on a signal that has come already
            signal.signal(number, previous[signal.Signals(number)])
        request.set()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM too, so that a run that is ended says how to go on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
