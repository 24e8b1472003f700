"""Server-sent events that keep their connection alive: whatever the answer does, no silence is long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType

from starlette.types import Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that buffers would turn a stream into one late block
]
COMMENT = b": waiting\n\n"
"""An event that every client of SSE passes over."""


class EventStream:
    """Sends the status with the first event, or on its own once that takes too long; then comments in silences.

    Used as a context, around everything that is sent.
    """

    def __init__(
        self, send: Send, notes: Sequence[tuple[bytes, bytes]], *, headers_after_s: float, keepalive_s: float
    ) -> None:
        """`notes`: headers of its own."""
        self._send = send
        self._headers = [*_HEADERS, *notes]
        self._headers_after_s = headers_after_s
        self._keepalive_s = keepalive_s
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._sending = asyncio.Lock()  # a comment may not come between the status and the first event
        self.started = False
        """Whether the status is out."""

    async def __aenter__(self) -> EventStream:
        self._keeping = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)

    async def send(self, events: bytes, *, last: bool = False) -> None:
        """Send events, after the status."""
        async with self._sending:
            await self._write(events, last)

    async def _write(self, events: bytes, last: bool) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})
        self._last = self._loop.time()

    async def _keep_alive(self) -> None:
        await asyncio.sleep(self._headers_after_s)
        while True:
            async with self._sending:
                silent = self._loop.time() - self._last
                if not self.started or silent >= self._keepalive_s:
                    await self._write(COMMENT, last=False)
                    silent = 0.0
            await asyncio.sleep(self._keepalive_s - silent)
