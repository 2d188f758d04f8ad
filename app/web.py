"""What stands before the pages: bounded requests, a health check, figures for Prometheus. Plain ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from app.calls import Calls
from app.service import Service
from app.uploads import Uploads

Scope, Message = dict[str, Any], dict[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_UPLOAD_ROOM = 1 << 20  # bytes of an upload that are not the file
_UPLOADS = 50  # times the largest file that are kept at once
_SECONDS, _RATE = 60.0, 50_000  # that an upload or a call may take to come in, and bytes a second that count besides
# Of Gradio's: state written to the disk for good; videos given to a converter; other Spaces' runs; functions of
# components, of which none here has any.
_CLOSED = ("/deep_link", "/process_recording", "/run-history", "/component_server")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
    # What a stranger's text may have in it, a visitor's browser fetches from nowhere. (Gradio's scripts are inline.)
    (b"content-security-policy", b"img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
     b"style-src 'self' 'unsafe-inline'; frame-src 'self'; object-src 'none'; base-uri 'self'"),
]


class Traffic:
    """Streams of answers that are open now: heartbeats, which never end, are not counted."""

    def __init__(self) -> None:
        self.open = 0

    def drain(self, seconds: float, quiet: float = 1.0) -> None:
        """Wait until there were none for a while, so many seconds at most: a program asks for its answer, which may be
        complete by then, in a second request."""
        now = time.monotonic()
        until, last = now + seconds, now
        while now < until and now < last + quiet:
            time.sleep(0.05)
            now = time.monotonic()
            last = now if self.open else last


class Guard:
    """ASGI middleware: refuses what is too long before it is read, answers ``/health`` and ``/metrics``.

    Args:
        app: what it stands before.
        service: whose figures and limits.
        traffic: where open streams are counted.
        calls: what the endpoints take; None leaves calls to Gradio.
    """

    def __init__(
        self, app: App, service: Service, traffic: Traffic | None = None, calls: Calls | None = None
    ) -> None:
        self.app, self.service, self.traffic, self.calls = app, service, traffic or Traffic(), calls
        self.uploads = Uploads(Path(get_upload_folder()), _UPLOADS * service.limits.file_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path == "/health":
            return await _answer(send, *((503, b"shutting down\n") if self.service.desk.closed else (200, b"ok\n")))
        if path == "/metrics":
            return await _answer(send, 200, self.service.metrics(), b"text/plain; version=0.0.4; charset=utf-8")
        if any(f"{name}/" in f"{path}/" for name in _CLOSED):
            return await _answer(send, 404, b"There is nothing here.\n")
        limits, uploading = self.service.limits, path.endswith("/upload")
        most = limits.file_bytes + _UPLOAD_ROOM if uploading else limits.body_bytes
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > most:
            return await self._refuse(send, most)
        if uploading:
            return await self._uploaded(scope, receive, send, int(told) or most)
        if self.calls is not None and scope["method"] == "POST" and self.calls.concern(path):
            soon = _soon(receive, _SECONDS + int(told) / _RATE)
            return await self._checked(self.calls, path, scope, soon, receive, send, most)
        counted = int("/call/" in path or path.endswith("/queue/data"))
        self.traffic.open += counted
        try:
            return await self._bounded(scope, receive, send, most)
        finally:
            self.traffic.open -= counted

    async def _uploaded(self, scope: Scope, receive: Receive, send: Send, told: int) -> None:
        """Take files, if there is room for as much as the request says that it brings."""
        async with self.uploads.room(told) as room:
            if room:
                return await self._bounded(scope, _soon(receive, _SECONDS + told / _RATE), send, told)
        await _answer(send, 507, b"There is no room for uploads now: they are deleted after an hour.\n")

    async def _checked(
        self, calls: Calls, path: str, scope: Scope, soon: Receive, receive: Receive, send: Send, most: int
    ) -> None:
        """Read a call whole, ``soon``, and pass it on if there is nothing wrong with it."""
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await soon()
            if message["type"] != "http.request":
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > most:
                return await self._refuse(send, most)
        body = b"".join(parts)
        if (complaint := await asyncio.to_thread(calls.complaint, path, body)) is not None:
            answer = json.dumps({"detail": complaint}).encode()
            return await _answer(send, 422, answer, b"application/json")
        read = False

        async def again() -> Message:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._bounded(scope, again, send, most)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Pass on at most so many bytes of the body, whatever length was told."""
        read, begun = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise _TooLong
            return message

        async def headed(message: Message) -> None:
            nonlocal begun
            if read > most and not begun:  # whatever the app makes of a body that broke off
                return
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        with contextlib.suppress(_TooLong):
            await self.app(scope, counted, headed)
        if read > most and not begun:
            await self._refuse(send, most)

    async def _refuse(self, send: Send, most: int) -> None:
        self.service.desk.metrics.refusals.labels("length").inc()
        await _answer(send, 413, f"The request is too long: at most {most:,} bytes are read.\n".encode())


class _TooLong(Exception):
    pass


class Quiet(logging.Filter):
    """Keeps health checks and Prometheus out of an access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.getMessage()
        return not ("/health" in line or "/metrics" in line)


async def _answer(send: Send, code: int, body: bytes, kind: bytes = b"text/plain; charset=utf-8") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _soon(receive: Receive, seconds: float) -> Receive:
    """What comes in within so many seconds; after that it is as if the other side had gone."""
    until = time.monotonic() + seconds

    async def received() -> Message:
        try:
            return await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except asyncio.TimeoutError:
            return {"type": "http.disconnect"}

    return received
