"""Security of every request: its Host, Origin and token are checked, its body is JSON of a bounded size, in time.

A page of another site that is open in the same browser must not paint, read or stop anything here, by whatever name it
reaches this address (DNS rebinding), and one client must not hold the server up.
"""

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from gobelin.errors import UsageError
from gobelin.server.limits import ServerLimits, ServerOptions
from gobelin.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

CSP = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy of everything but :data:`STANDALONE_CSP`'s."""
STANDALONE_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts"
)
"""Policy of a page that holds its script itself: it runs in an origin of its own, which is allowed nothing here."""
COOKIE = "gobelin_token"
MIN_TOKEN = 16  # characters: as many as cannot be guessed over a network
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cache-control": b"no-store",
}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_LOCAL_NAMES = ("localhost",)


def is_loopback(host: str) -> bool:
    """Tell whether an address, or the name localhost, is this machine's own."""
    if host in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_options(options: ServerOptions) -> None:
    """Raise :class:`UsageError` for an address that others can reach without a token, and for a short token."""
    if options.token is not None and (len(options.token) < MIN_TOKEN or not options.token.isascii()):
        raise UsageError(f"the token has {len(options.token)} characters: give {MIN_TOKEN} ASCII characters or more")
    if options.token is None and not is_loopback(options.host):
        raise UsageError(
            f"--host is {options.host}, which other machines can reach: give a --token, or set GOBELIN_TOKEN"
        )
    if options.token is None and options.names:
        raise UsageError(
            f"--name is {options.names[0]}, by which others reach it: give a --token, or set GOBELIN_TOKEN"
        )


class _Held:
    """Bytes of one request's body that are held."""

    size = 0


class _RefusedError(Exception):
    """A request that is refused: its status and its sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Guard:
    """ASGI middleware that lets through only what is allowed, and adds headers to every response."""

    def __init__(self, app: AsgiApp, options: ServerOptions, limits: ServerLimits, metrics: Metrics):
        self._app = app
        self._options = options
        self._limits = limits
        self._metrics = metrics
        self._held = 0  # bytes of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name.lower() for name, _ in message.get("headers", [])}
                added = {**_HEADERS, b"content-security-policy": CSP.encode()}
                message["headers"] = [
                    *message.get("headers", []),
                    *((name, value) for name, value in added.items() if name not in there),
                ]
            await send(message)

        held = _Held()
        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_source(scope, headers)
            if self._options.token is not None and self._signs_in(scope):
                await self._sign_in(send_with_headers)
                return
            self._check_token(scope, headers)
            body = await self._read_body(scope, headers, receive, held)
            await self._app(scope, _replayed(body, receive), send_with_headers)
        except _RefusedError as refused:
            kind = {401: "token", 503: "busy"}.get(refused.status, "usage")
            await _respond(send_with_headers, refused.status, str(refused), kind)
        finally:
            self._held -= held.size
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(method, route, str(status)).inc()

    def _check_source(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse names that are not this server's, and requests that another site's page makes."""
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        host = headers.get("host", "")
        if len(hosts) != 1 or not self._is_ours(host):
            raise _RefusedError(403, "the Host is not this server's: open it by the address that it printed")
        origin = headers.get("origin")
        if origin is not None:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or parts.netloc.lower() != host.lower():
                raise _RefusedError(403, "the Origin is not this server's: other sites may not use it")
        site = headers.get("sec-fetch-site", "none")
        navigates = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
        if site not in ("none", "same-origin") and not navigates:
            raise _RefusedError(403, "the request comes from another site's page, which may not use this server")

    def _is_ours(self, host: str) -> bool:
        """Tell whether a Host header names this server.

        An address that is written in numbers is no name that somebody else could point here.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
            _ = urlsplit(f"//{host}").port
        except ValueError:
            return False
        if "@" in host or "/" in host or not name:
            return False
        if name in {one.lower() for one in self._options.names}:
            return True
        if is_loopback(self._options.host):
            return is_loopback(name)
        if name in (self._options.host.lower(), *_LOCAL_NAMES, socket.gethostname().lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse a request without the token; the page's own files hold no secret, and say how to sign in."""
        if self._options.token is None or scope["path"] == "/" or scope["path"].startswith("/assets/"):
            return
        given = headers.get("authorization", "")
        token = given[7:] if given[:7].lower() == "bearer " else ""
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE and not token:
                token = value
        if not _same(token, self._options.token):
            raise _RefusedError(
                401, "the token is missing or wrong: send it as Authorization: Bearer, or open /?token= in a browser"
            )

    def _signs_in(self, scope: Scope) -> bool:
        """Tell whether a browser opens the page with the right token in its address."""
        if scope["method"] != "GET" or scope["path"] != "/":
            return False
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        return bool(given) and _same(given, self._options.token or "")

    async def _sign_in(self, send: Send) -> None:
        """Move the token from the address, where it would stay in histories, into a cookie."""
        cookie = f"{COOKIE}={self._options.token}; Path=/; HttpOnly; SameSite=Strict"
        headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def _read_body(self, scope: Scope, headers: dict[str, str], receive: Receive, held: "_Held") -> bytes:
        """Read the whole body: JSON, not too large, and not too slowly."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.body:
            raise _RefusedError(413, f"the body has {int(length):,} bytes: give {self._limits.body:,} at most")
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._received(receive, held)
        except TimeoutError:
            raise _RefusedError(408, "the body came in too slowly: send it again") from None
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise _RefusedError(415, "the body is not JSON: send it as Content-Type: application/json")
        if body and scope["method"] in ("GET", "HEAD", "DELETE"):
            raise _RefusedError(400, f"a {scope['method']} takes no body: leave it out")
        return body

    async def _received(self, receive: Receive, held: "_Held") -> bytes:
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _RefusedError(400, "the client went away")
            parts.append(message.get("body", b""))
            held.size += len(parts[-1])
            self._held += len(parts[-1])
            if self._held > self._limits.waiting_bytes:
                raise _RefusedError(503, "too many large requests at once: try again in a moment")
            if held.size > self._limits.body:
                raise _RefusedError(413, f"the body has more than {self._limits.body:,} bytes: give fewer")
            if not message.get("more_body", False):
                return b"".join(parts)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read, once, and then what comes after it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _respond(send: Send, status: int, sentence: str, kind: str) -> None:
    content = json.dumps({"error": {"message": sentence, "type": kind, "field": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
