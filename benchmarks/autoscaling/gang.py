"""A gang in simulated time: steps in lockstep, admission and what refused clients do, workers that come and go.

What decides is the product's own: the policy, how long a refused request counts, the measured drain rate behind
Retry-After, a worker's share of a step's tokens. What a step takes is a model. Clients that are refused come again
after the Retry-After that they were told, as often as it takes.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from divisi.benchmarks.autoscaling.arrivals import Arrival
from divisi.benchmarks.autoscaling.deciders import Decider, Seen
from divisi.deploy.limits.drain_rate import DrainRate
from divisi.deploy.limits.refusals import Refusals
from divisi.deploy.routing import TOKENS_PER_REQUEST

_DECIDE_EVERY_S = 0.5


@dataclass(frozen=True)
class Model:
    """A worker and its steps. The times are those of a split decode step of one worker and one shard at batch 1 and 16,
    and of a prefill, with bench-s on the CPU of the README's tables. Shards are taken to be as many as are needed."""

    step_s: float = 0.0162
    decode_row_s: float = 0.0032
    prefill_row_s: float = 0.00058
    max_seqs: int = 32
    max_step_tokens: int = 4096
    """Of the whole gang."""
    start_s: float = 10.0
    """From the decision to the first step of a worker."""
    epoch_s: float = 0.1
    """Everybody stands still when a worker comes or goes."""

    def share(self, workers: int) -> int:
        """Rows that each of so many workers may bring to a step."""
        return max(self.max_step_tokens // workers, self.max_seqs)


@dataclass(slots=True)
class _Open:
    """A request on its way."""

    asked_at: float
    prompt_left: int
    answer_left: int
    decoding_since: int = -1
    """The step."""
    begun_at: float = -1.0


@dataclass(slots=True, eq=False)
class _Worker:
    prefills: deque[_Open] = field(default_factory=deque)
    decoding: set[int] = field(default_factory=set)
    """By `id`, since requests are many."""

    @property
    def load(self) -> int:
        return len(self.prefills) + len(self.decoding)


@dataclass
class Outcome:
    """What came of it."""

    waits: list[float] = field(default_factory=list)
    """Seconds from a request's first attempt until its prompt begins to be computed."""
    attempts: int = 0
    refused: int = 0
    worker_s: float = 0.0
    """Of those that serve and those that start."""
    changes: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)
    """Time, and workers from then on."""

    def wait_s(self, quantile: float) -> float:
        """Of the waits."""
        ordered = sorted(self.waits)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)] if ordered else math.nan


class SimulatedGang:
    """One run."""

    def __init__(self, arrivals: Sequence[Arrival], decider: Decider, model: Model, seed: int = 0) -> None:
        self.now = 0.0
        self._model, self._decider = model, decider
        self._rng = random.Random(seed)
        # Those to come, the next first: (time, tie, request).
        self._coming = [
            (arrival.at, number, _Open(arrival.at, arrival.prompt, arrival.answer))
            for number, arrival in enumerate(arrivals)
        ]
        heapq.heapify(self._coming)
        self._ties = len(self._coming)
        self._workers = [_Worker() for _ in range(decider.first)]
        self._starting: list[float] = []
        self._requests: dict[int, _Open] = {}
        self._ends: dict[int, list[tuple[_Worker, int]]] = {}
        self._step = 0
        self._decided_at = -math.inf
        self._rate, self._refusals = DrainRate(lambda: self.now), Refusals(lambda: self.now)
        self._queued = self._left = 0
        """Prompt tokens of requests that have not begun; all tokens that are still to be computed."""
        self._waiting_clients = 0
        self.outcome = Outcome(timeline=[(0.0, decider.first)])

    def run(self, until: float) -> Outcome:
        """Until that time, and all requests are answered."""
        while self.now < until or self._coming or self._requests:
            self._admit()
            self._decide()
            if self._requests:
                self._advance(self._one_step())
            else:
                self._idle(until)
        return self.outcome

    def _idle(self, until: float) -> None:
        following = self._coming[0][0] if self._coming else max(until, self.now + 1e-3)
        self._advance(max(min(following, self._decided_at + _DECIDE_EVERY_S) - self.now, 1e-3))

    def _advance(self, seconds: float) -> None:
        self.outcome.worker_s += seconds * (len(self._workers) + len(self._starting))
        self.now += seconds

    # Admission.

    def _admit(self) -> None:
        limit = self._model.max_seqs * len(self._workers)
        while self._coming and self._coming[0][0] <= self.now:
            at, _, request = heapq.heappop(self._coming)
            self._waiting_clients -= at > request.asked_at
            self.outcome.attempts += 1
            if len(self._requests) >= limit or self._queued >= 32 * self._model.max_step_tokens:
                self._refuse(request)
                continue
            if not self._requests:
                self._rate.start()
            self._requests[id(request)] = request
            self._queued += request.prompt_left
            self._left += request.prompt_left + request.answer_left
            min(self._workers, key=lambda worker: worker.load).prefills.append(request)

    def _refuse(self, request: _Open) -> None:
        rate = self._rate.per_second()
        wait_s = math.ceil(min(max(self._left / rate, 1.0), 600.0)) if rate else 1
        self.outcome.refused += 1
        self._refusals.add(request.prompt_left + TOKENS_PER_REQUEST, wait_s)
        self._ties += 1
        self._waiting_clients += 1
        again = self.now + wait_s + self._rng.random()
        heapq.heappush(self._coming, (again, self._ties, request))

    # A step.

    def _one_step(self) -> float:
        """Compute; returns the seconds that it takes, which are those of the slowest worker."""
        model, longest, decoding = self._model, 0.0, 0
        share = model.share(len(self._workers))
        for worker in self._workers:
            rows = self._prefill(worker, share - len(worker.decoding)) if worker.prefills else 0
            decoding += len(worker.decoding)
            longest = max(longest, model.decode_row_s * len(worker.decoding) + model.prefill_row_s * rows)
        self._step += 1
        for worker, number in self._ends.pop(self._step, ()):
            if number in worker.decoding:
                worker.decoding.remove(number)
                self._finish(number)
        self._left -= decoding
        self._rate.add(decoding)
        return model.step_s + longest

    def _prefill(self, worker: _Worker, rows: int) -> int:
        """The oldest first; returns the rows computed."""
        used = 0
        while used < rows and worker.prefills and len(worker.decoding) < self._model.max_seqs:
            request = worker.prefills[0]
            if request.begun_at < 0:
                request.begun_at = self.now
                self.outcome.waits.append(self.now - request.asked_at)
            taken = min(rows - used, request.prompt_left)
            request.prompt_left -= taken
            used += taken
            if request.prompt_left == 0:
                worker.prefills.popleft()
                worker.decoding.add(id(request))
                request.decoding_since = self._step + 1
                self._ends.setdefault(self._step + 1 + request.answer_left, []).append((worker, id(request)))
        self._queued -= used
        self._left -= used
        self._rate.add(used)
        return used

    def _finish(self, number: int) -> None:
        del self._requests[number]
        if not self._requests:
            self._left = self._queued = 0
            self._rate.pause()

    # Workers.

    def _decide(self) -> None:
        ready = [at for at in self._starting if at <= self.now]
        for at in ready:
            self._starting.remove(at)
            self._workers.append(_Worker())
            self._advance(self._model.epoch_s)
        if self.now < self._decided_at + _DECIDE_EVERY_S:
            return
        self._decided_at = self.now
        target = len(self._workers) + len(self._starting)
        load = self._queued + TOKENS_PER_REQUEST * len(self._requests)
        seen = Seen(self.now, load, self._refusals.tokens(), len(self._requests) + self._waiting_clients, target)
        wanted = self._decider.decide(seen)
        if wanted == target:
            return
        self.outcome.changes += 1
        self.outcome.timeline.append((self.now, wanted))
        self._starting += [self.now + self._model.start_s] * max(wanted - target, 0)
        for _ in range(target - wanted):
            if self._starting:
                self._starting.pop()
            else:
                self._take_away()

    def _take_away(self) -> None:
        """The newest; the others compute again what it had, the oldest first."""
        worker = self._workers.pop()
        self._advance(self._model.epoch_s)
        for number in worker.decoding:
            request = self._requests[number]
            done = max(self._step + 1 - request.decoding_since, 0)
            again = request.prompt_left + done + 1
            request.prompt_left, request.answer_left = again, max(request.answer_left - done, 1)
            self._queued += again
            self._left += again
        moved = sorted([*(self._requests[number] for number in worker.decoding), *worker.prefills], key=_age)
        worker.decoding.clear()  # its ends are no ends any more
        for request in moved:
            other = min(self._workers, key=lambda other: other.load)
            other.prefills.append(request)
        for other in self._workers:
            other.prefills = deque(sorted(other.prefills, key=_age))


def _age(request: _Open) -> float:
    return request.asked_at
