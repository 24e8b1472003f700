"""Streams that are always open, and the blows that fall beside them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import httpx
import psutil

from tests.e2e.chaos.asks import Ask, stopping
from tests.e2e.chaos.blows import Blow
from tests.e2e.chaos.judge import Span, Struck
from tests.e2e.chaos.reading import Answer
from tests.e2e.chaos.victims import Victims, let_go, strike
from tests.e2e.conftest import Cluster

STREAMS = 8
_RETRY_S = 0.25
_SILENT_S = 60.0
_SETTLE_S = 90.0
_LOOK_EVERY_S = 1.0
_WORKER_STARTS_S = 6.0
"""A worker's process that is younger has hardly loaded its weights."""
Say = Callable[[str], None]


@dataclass
class Record:
    """What happened; times are in seconds since the streams began."""

    references: dict[str, Answer] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    no_workers: list[Span] = field(default_factory=list)
    seconds: float = 0.0


class Chaos:
    """One run against a server with two workers, two shards and two ingresses."""

    def __init__(self, cluster: Cluster, blows: Sequence[Blow], say: Say) -> None:
        self._cluster, self._blows, self._say = cluster, blows, say
        self._victims = Victims(cluster)
        self._record = Record()
        self._zero = time.monotonic()
        self._open: dict[int, Answer] = {}
        """By slot."""
        self._over = False

    async def run(self, asks: Sequence[Ask]) -> Record:
        """References first, undisturbed; then all streams, and the blows."""
        async with self._clients() as http:
            asked = await self._find_references(http, asks)
            self._say(f"{len(asked)} references of {min(a.num_tokens for a in self._record.references.values())} to "
                      f"{max(a.num_tokens for a in self._record.references.values())} tokens")  # fmt: skip
            self._zero = time.monotonic()
            watching = asyncio.create_task(self._watch(http))
            slots = [asyncio.create_task(self._keep_open(http, slot, asked)) for slot in range(STREAMS)]
            await self._until_all_have_tokens()
            begin = self._now()
            async with asyncio.TaskGroup() as stopped:
                for blow in self._blows:
                    await asyncio.sleep(max(begin + blow.at_s - self._now(), 0.0))
                    await self._strike(blow, stopped)
            self._over = True
            _, late = await asyncio.wait(slots, timeout=_SETTLE_S)
            for slot in late:
                slot.cancel()
            await asyncio.gather(*slots, return_exceptions=True)
            watching.cancel()
        self._record.seconds = self._now()
        return self._record

    @contextlib.asynccontextmanager
    async def _clients(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(_SILENT_S, connect=5.0)
        async with httpx.AsyncClient(base_url=f"{self._cluster.url}/v1/", timeout=timeout, limits=limits) as http:
            yield http

    def _now(self) -> float:
        return time.monotonic() - self._zero

    async def _find_references(self, http: httpx.AsyncClient, asks: Sequence[Ask]) -> list[Ask]:
        """Returns what is to be asked: stop strings are in it now."""
        references = self._record.references
        references |= await self._undisturbed(http, asks)
        asked = []
        for ask in asks:
            if ask.name.startswith("stop"):
                ask = stopping(ask, references[ask.name].choices[0].text)
            asked.append(ask)
        references |= await self._undisturbed(http, [ask for ask in asked if "stop" in ask.body])
        return asked

    async def _undisturbed(self, http: httpx.AsyncClient, asks: Sequence[Ask]) -> dict[str, Answer]:
        turn = asyncio.Semaphore(STREAMS)

        async def ask_one(ask: Ask) -> Answer:
            async with turn:
                return await self._ask(http, ask, -1)

        answers = await asyncio.gather(*map(ask_one, asks))
        assert not [answer.error for answer in answers if not answer.done], "a reference failed"
        return {answer.ask: answer for answer in answers}

    async def _keep_open(self, http: httpx.AsyncClient, slot: int, asked: Sequence[Ask]) -> None:
        """One answer after another; what was refused is asked for again."""
        for ask in islice(cycle(asked), slot, None):
            while not self._over:
                answer = await self._ask(http, ask, slot)
                if answer.done or answer.times:
                    break
                await asyncio.sleep(_RETRY_S)
            if self._over:
                return

    async def _ask(self, http: httpx.AsyncClient, ask: Ask, slot: int) -> Answer:
        answer = Answer(ask.name, slot, begun=self._now())
        if slot >= 0:
            self._open[slot] = answer
            self._record.answers.append(answer)
        try:
            async with http.stream("POST", ask.path, json=ask.body) as response:
                if response.status_code != 200:
                    answer.error = _refusal(response.status_code, await response.aread())
                else:
                    async for line in response.aiter_lines():
                        answer.take(line, self._now())
        except httpx.HTTPError as error:
            answer.error = answer.error or f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            answer.error = answer.error or f"still open {_SETTLE_S:g} s after the last blow"
            raise
        finally:
            answer.ended = self._now()
            answer.error = answer.error or ("" if answer.done else "the stream ended without [DONE]")
        return answer

    async def _until_all_have_tokens(self) -> None:
        async with asyncio.timeout(60):
            while len(self._open) < STREAMS or not all(answer.times for answer in self._open.values()):
                await asyncio.sleep(0.05)

    async def _strike(self, blow: Blow, stopped: asyncio.TaskGroup) -> None:
        processes = await asyncio.to_thread(self._victims.choose, blow)
        theirs = await asyncio.to_thread(self._victims.open_streams, blow.kind, processes)
        if theirs is None:
            theirs = sum(not answer.ended for answer in self._open.values())
        begin = self._now()
        strike(processes, blow.stopped_s is None)
        end = begin + (blow.stopped_s or 0.0)
        self._record.struck.append(Struck(blow, begin, end, len(processes), theirs))
        who = ", ".join(str(process.pid) for process in processes) or "nobody there"
        self._say(f"{blow}: {who}, {theirs} of {STREAMS} streams theirs")
        if blow.stopped_s is not None:
            stopped.create_task(self._let_go(processes, blow.stopped_s))

    async def _let_go(self, processes: Sequence[psutil.Process], after_s: float) -> None:
        await asyncio.sleep(after_s)
        let_go(processes)

    async def _watch(self, http: httpx.AsyncClient) -> None:
        """Notes when no worker lives, and who can be scraped where."""
        while True:
            alive = await asyncio.to_thread(self._victims.living_workers, _WORKER_STARTS_S, time.time())
            now = self._now()
            if not alive:
                spans = self._record.no_workers
                begin = spans.pop()[0] if spans and spans[-1][1] > now - 2 * _LOOK_EVERY_S - 1 else now - _LOOK_EVERY_S
                spans.append((begin, now))
            with contextlib.suppress(httpx.HTTPError):
                reply = await http.get(f"{self._cluster.url}/metrics/targets", timeout=1.0)
                if reply.status_code == 200:
                    found = [target.rsplit(":", 1) for group in reply.json() for target in group["targets"]]
                    self._victims.targets = {int(port): host for host, port in found}
            await asyncio.sleep(_LOOK_EVERY_S)


def _refusal(status: int, content: bytes) -> str:
    """As OpenAI spells it, or by its status alone."""
    try:
        error = httpx.Response(status, content=content).json()["error"]
        return f"status {status} {error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}: {content[:100]!r}"
