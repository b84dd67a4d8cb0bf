"""What stands before the application: who may ask, how much, how long, and what browsers may do with the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
# in the middle of its upload never shows the answer.
DRAIN = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request, and all of them, may take.

    Attributes:
        body_bytes: of one request.
        pixels: of one image, before it is decoded: a small file can hold a huge picture.
        images: in one request.
        requests: that are being read or wait for their answer; one more gets 503.
        seconds: from the first byte of a request to its answer.
        retry_after_seconds: what a client is told that has to come again.
    """

    body_bytes: int = 16 * 2**20
    pixels: int = 64_000_000
    images: int = 64
    requests: int = 64
    seconds: float = 30.0
    retry_after_seconds: int = 1


class RefusedError(Exception):
    """A request that gets no other answer than this one."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers

    def response(self) -> JSONResponse:
        """Return the answer, of the form that FastAPI's own errors have."""
        return JSONResponse({"detail": self.detail}, self.status, self.headers)


def busy(limits: Limits) -> RefusedError:
    """Return the answer to a request that finds too many before it."""
    return RefusedError(
        503, "too many requests are waiting: come again", {"Retry-After": str(limits.retry_after_seconds)}
    )


class Guard:
    """ASGI middleware that lets a request through where everything about it is in order.

    Args:
        app: what it guards.
        limits: see there.
        host: the name or address that the server listens on.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, host: str) -> None:
        self.app, self.limits = app, limits
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.open = 0  # requests with a body that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            _check_origin(Headers(scope=scope), self.names)
            if scope["method"] in ("GET", "HEAD"):
                await self.app(scope, receive, answer.send)
            else:
                await self._with_body(scope, receive, answer)
        except RefusedError as refused:
            await refused.response()(scope, receive, answer.send)

    async def _with_body(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        if self.open >= self.limits.requests:
            raise busy(self.limits)
        self.open += 1
        body: bytes | None = None
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._read(scope, receive)
                await self.app(scope, _replay(body, receive), answer.send)
        except TimeoutError:
            if answer.started:
                raise
            if body is None:
                raise RefusedError(408, f"the request did not arrive within {self.limits.seconds:g} seconds") from None
            raise RefusedError(504, f"the answer took longer than {self.limits.seconds:g} seconds") from None
        finally:
            self.open -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body."""
        limit, size = self.limits.body_bytes, 0
        parts: list[bytes] = []
        stated = Headers(scope=scope).get("content-length", "0")
        fits = stated.isdigit() and int(stated) <= limit
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(400, "the request ended before its body did")
            part = message.get("body", b"")
            size += len(part)
            fits = fits and size <= limit
            if fits:
                parts.append(part)
            if not message.get("more_body") or size > DRAIN * limit:
                break
        if not fits:
            raise RefusedError(413, f"the body must have at most {limit} bytes")
        return b"".join(parts)


class _Answer:
    """Passes an answer on, with the security headers, and remembers whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


def _check_origin(headers: Headers, names: Iterable[str]) -> None:
    """Refuse a request that another site's page sent, or that came by a name which that site may own.

    A page of another site can point its own name at this machine (DNS rebinding) and would then count as ours. It
    cannot do so with an address, with localhost, or with this machine's name.
    """
    host = headers.get("host", "")
    if not _is_ours(host, names):
        raise RefusedError(403, "the Host header must be an address, localhost, or the name that was given as --host")
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise RefusedError(403, "the Origin header must be that of this server: pages of other sites may not ask it")


def _is_ours(host: str, names: Iterable[str]) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() in names:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that hands out the body that has been read, and then what comes after it."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
