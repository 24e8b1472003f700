"""From the step loop's thread to the asyncio tasks that wait for tokens: one hop per step, whatever the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import TokenEvent


class TokenStream:
    """The events of one request that nobody has taken yet."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Add an event, in the event loop's thread."""
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> list[TokenEvent]:
        """Everything that came since the last call, at least one event: a slow reader gets fewer, larger items."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class TokenStreams:
    """The streams of all requests of one attention worker."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, TokenStream] = {}

    def open(self, request_id: str) -> TokenStream:
        """Begin to collect a request's events, in the event loop that will take them.

        Raises RequestRejected for the id of a request that is still being served: the two would share their end.
        """
        if request_id in self._streams:
            raise RequestRejected(f"request id {request_id!r} is already being served")
        self._loop = asyncio.get_running_loop()
        stream = self._streams[request_id] = TokenStream()
        return stream

    def close(self, request_id: str) -> None:
        """Drop a request's events from now on."""
        self._streams.pop(request_id, None)

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        """Take the events of a step, in the step loop's thread."""
        # Without a loop no request was ever opened, and without requests there are no events.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, events)

    def _sort(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            if (stream := self._streams.get(event.request_id)) is not None:
                stream.put(event)
