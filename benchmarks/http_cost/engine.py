"""An engine client whose model step costs nothing: all streams get their tokens at the same moment, as from a step.

The next step comes when all streams have taken the last one's tokens, so that each event is sent on its own (the worst
case for a server), or after a fixed time, as from a model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.streams.client import TokenStream
from divisi.deploy.api.engine_client import GangStatus


class NoopEngine:
    """Implements `divisi.deploy.api.engine_client.EngineClient`; every answer is the same token ids."""

    def __init__(self, token_ids: Sequence[int], per_event: int = 1, step_s: float = 0.0) -> None:
        """`per_event` tokens in each event; `step_s` between steps, 0 for as soon as all have taken theirs."""
        groups = [tuple(token_ids[start : start + per_event]) for start in range(0, len(token_ids), per_event)]
        self._groups = groups
        self._step_s = step_s
        self._streams: dict[str, TokenStream] = {}
        self._at: dict[str, int] = {}
        self._untaken: set[str] = set()
        self._all_taken = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """See EngineClient."""
        stream = self._streams[request.request_id] = TokenStream(request)
        self._at[request.request_id] = 0
        if self._loop is None:
            self._loop = asyncio.create_task(self._steps())
        try:
            finished = False
            while not finished:
                events = await stream.take()
                finished = events[-1].finish_reason is not None
                yield events
                self._taken(request.request_id)
        finally:
            self._streams.pop(request.request_id, None)
            self._taken(request.request_id)

    async def check_ready(self) -> None:
        """See EngineClient: always ready."""

    async def status(self) -> GangStatus:
        """See EngineClient."""
        return GangStatus(True, "")

    def _taken(self, name: str) -> None:
        self._untaken.discard(name)
        if not self._untaken:
            self._all_taken.set()

    async def _steps(self) -> None:
        try:
            while self._streams:
                self._untaken.update(self._streams)
                self._all_taken.clear()
                for name, stream in list(self._streams.items()):
                    stream.put(self._next(name))
                if self._step_s:
                    await asyncio.sleep(self._step_s)
                else:
                    await self._all_taken.wait()
        finally:
            self._loop = None

    def _next(self, name: str) -> TokenEvent:
        at = self._at[name]
        self._at[name] = at + 1
        last = at + 1 == len(self._groups)
        if last:
            del self._streams[name], self._at[name]
        return TokenEvent(name, self._groups[at], None, finish_reason="length" if last else None)
