"""ASGI middleware: checks of the Host and Origin headers, limits on body and time, and security headers."""

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nin.display.numbers import format_bytes

# Scripts, styles and requests come from this server alone, and none are written into the page.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Of a body that is too large this many times the limit is still read and thrown away: a browser that is cut off
# in the middle of its upload shows a broken connection, not the response.
DRAIN_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on one request, and on all of them.

    Attributes:
        body_bytes: of one request.
        pixels: of one image, before it is decoded: a small file can hold a huge picture.
        images: in one request.
        requests: that are being read or wait for their response; one more gets 503.
        seconds: from the first byte of a request to its response.
        retry_after_seconds: Retry-After of a 503.
    """

    body_bytes: int = 16 * 2**20
    pixels: int = 64_000_000
    images: int = 64
    requests: int = 64
    seconds: float = 30.0
    retry_after_seconds: int = 1


def service_unavailable(limits: Limits) -> HTTPException:
    """Return the error of a request that comes while too many wait."""
    headers = {"Retry-After": str(limits.retry_after_seconds)}
    return HTTPException(503, "too many requests are waiting: come again", headers)


class SecurityMiddleware:
    """ASGI middleware that passes on requests of allowed hosts and origins that keep the limits.

    Args:
        app: the application.
        limits: on requests.
        host: the name or address that the server listens on.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, host: str) -> None:
        self.app, self.limits = app, limits
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.open_requests = 0  # with a body, and without a response yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sender = _ResponseSender(send)
        try:
            _check_origin(Headers(scope=scope), self.names)
            if scope["method"] in ("GET", "HEAD"):
                await self.app(scope, receive, sender.send)
            else:
                await self._pass_with_body(scope, receive, sender)
        except HTTPException as error:  # outside of FastAPI's own handler: a response of the same form
            response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            await response(scope, receive, sender.send)

    async def _pass_with_body(self, scope: Scope, receive: Receive, sender: "_ResponseSender") -> None:
        if self.open_requests >= self.limits.requests:
            raise service_unavailable(self.limits)
        self.open_requests += 1
        body: bytes | None = None
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._read_body(scope, receive)
                await self.app(scope, _replay_body(body, receive), sender.send)
        except TimeoutError:
            if sender.started:
                raise
            if body is None:
                raise HTTPException(408, f"the request did not arrive within {self.limits.seconds:g} seconds") from None
            raise HTTPException(504, f"the answer took longer than {self.limits.seconds:g} seconds") from None
        finally:
            self.open_requests -= 1

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body.

        It is read before the application runs, so that the limit holds without a Content-Length too.
        """
        limit, size = self.limits.body_bytes, 0
        parts: list[bytes] = []
        stated = Headers(scope=scope).get("content-length", "0")
        fits = stated.isdigit() and int(stated) <= limit
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HTTPException(400, "the request ended before its body did")
            part = message.get("body", b"")
            size += len(part)
            fits = fits and size <= limit
            if fits:
                parts.append(part)
            if not message.get("more_body") or size > DRAIN_FACTOR * limit:
                break
        if not fits:
            raise HTTPException(413, f"too large: at most {format_bytes(limit)} can be sent at once")
        return b"".join(parts)


class _ResponseSender:
    """Sends a response with the security headers; ``started`` says whether its beginning is sent."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


def _check_origin(headers: Headers, names: Iterable[str]) -> None:
    """Raise 403 for a request that another site's page sent, or that came by a name which that site may own.

    A page of another site can point its own name at this machine (DNS rebinding) and would then count as ours. It
    cannot do so with an address, with localhost, or with this machine's name.
    """
    host = headers.get("host", "")
    if not _is_allowed(host, names):
        raise HTTPException(403, "the Host header must be an address, localhost, or the name that was given as --host")
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise HTTPException(403, "the Origin header must be that of this server: pages of other sites may not ask it")


def _is_allowed(host: str, names: Iterable[str]) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() in names:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """Return a receiver of the body that has been read, and of the messages after it."""
    unsent: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unsent.pop() if unsent else await receive()

    return replay
