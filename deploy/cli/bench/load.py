"""Sends requests at a rate or at a concurrency, and watches each to its end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import httpx

from divisi.deploy.cli.bench.outcome import Outcome, Summary
from divisi.deploy.cli.bench.workload import Source
from divisi.deploy.cli.remote import RemoteError, stream_events_async

Clock = Callable[[], float]


@dataclass(frozen=True)
class Schedule:
    """How many requests, and when. Either `rate` (Poisson arrivals a second) or `concurrency` is set."""

    path: str
    requests: int | None
    duration_s: float | None
    """Nothing is sent later than this; what runs then is waited for."""
    concurrency: int | None = None
    rate: float | None = None
    seed: int = 0


class Load:
    """One run. Outcomes can be read while it goes on."""

    def __init__(self, client: httpx.AsyncClient, source: Source, schedule: Schedule, clock: Clock) -> None:
        self._client = client
        self._source = source
        self._plan = schedule
        self._clock = clock
        self._begin = 0.0
        self._end: float | None = None
        self.outcomes: list[Outcome] = []

    @property
    def begin(self) -> float:
        """The instant that the run began, on its clock."""
        return self._begin

    def summary(self) -> Summary:
        """The numbers so far, or of the whole run once it has ended."""
        return Summary.of(self.outcomes, (self._clock() if self._end is None else self._end) - self._begin)

    async def run(self) -> None:
        """Send everything and wait for every end. Cancelled, it gives up what is in flight and counts it as aborted."""
        self._begin = self._clock()
        try:
            await (self._at_a_rate() if self._plan.rate is not None else self._at_a_concurrency())
        finally:
            self._end = self._clock()

    async def _at_a_concurrency(self) -> None:
        async def worker() -> None:
            while not self._is_over(len(self.outcomes)):
                await self._one(self._add(self._clock()))

        async with asyncio.TaskGroup() as group:
            for _ in range(self._plan.concurrency or 1):
                group.create_task(worker())

    async def _at_a_rate(self) -> None:
        """Independent arrivals: a slow server does not slow them down, so its queue shows."""
        assert self._plan.rate is not None
        rng = random.Random(self._plan.seed)
        due = self._begin
        async with asyncio.TaskGroup() as group:
            while not self._is_over(len(self.outcomes), due):
                await asyncio.sleep(max(0.0, due - self._clock()))
                group.create_task(self._one(self._add(due)))
                due += rng.expovariate(self._plan.rate)

    def _is_over(self, sent: int, now: float | None = None) -> bool:
        if self._plan.requests is not None and sent >= self._plan.requests:
            return True
        elapsed = (self._clock() if now is None else now) - self._begin
        return self._plan.duration_s is not None and elapsed >= self._plan.duration_s

    def _add(self, due: float) -> Outcome:
        outcome = Outcome(due)
        self.outcomes.append(outcome)
        return outcome

    async def _one(self, outcome: Outcome) -> None:
        body = self._source()
        outcome.sent = self._clock()
        try:
            async with aclosing(stream_events_async(self._client, self._plan.path, body)) as events:
                async for event in events:
                    outcome.take(event, self._clock())
            outcome.status = "ok"
        except RemoteError as error:
            outcome.status = "rejected" if error.status == 429 else "error"
            outcome.error = str(error)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            outcome.status, outcome.error = "error", f"an event of the stream has an unknown shape: {error!r}"
        except asyncio.CancelledError:
            outcome.status = "aborted"
            raise
        finally:
            outcome.end = self._clock()
