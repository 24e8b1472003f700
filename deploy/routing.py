"""Which attention worker gets a request: the one with the fewest tokens to compute. Plain Python, no Ray, no torch.

A worker reports its queue as it changes, a few times a second. What this process has sent it since is added to the
report, or a burst would go to one worker as a whole. Several ingress replicas don't see each other's requests until
the next report: each then compares only two workers that it draws at random, since all of them taking the best at once
would swamp it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

TOKENS_PER_REQUEST = 64
"""What an unfinished request counts besides its prompt, for its answer; else a worker that only decodes looks idle."""
_TRANSIT_S = 0.1
"""A request sent so shortly before a report may not have been in it."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's queue at one moment."""

    taken_at: float
    """When it came here, in seconds of the monotonic clock."""
    queued_tokens: int
    """Prompt tokens still to be computed."""
    unfinished: int
    """Requests that run or wait."""
    free_tokens: int = 2**62
    """Tokens for which it has room at once."""


WorkerT = TypeVar("WorkerT")


@dataclass(frozen=True, slots=True)
class _Sent(Generic[WorkerT]):
    worker: WorkerT
    tokens: int
    at: float


class QueuedTokens(Generic[WorkerT]):
    """Estimates each worker's queue. Methods may be called from several threads."""

    def __init__(
        self, alone: bool = True, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None
    ) -> None:
        """`alone`: no other process sends requests to the same workers."""
        self._alone = alone
        self._clock = clock
        self._rng = rng or random.Random()
        self._sent: dict[str, _Sent[WorkerT]] = {}

    def choose(self, reports: Mapping[WorkerT, WorkerReport], request_id: str, prompt_tokens: int) -> WorkerT:
        """Pick a worker for a request, and count the request as sent to it."""
        loads = self.loads(reports)
        if roomy := {worker: load for worker, load in loads.items() if reports[worker].free_tokens >= prompt_tokens}:
            loads = roomy  # elsewhere it would wait for pages, however short the queue is
        drawn = self._rng.sample(list(loads), len(loads) if self._alone else min(2, len(loads)))
        best = min(drawn, key=loads.__getitem__)
        self._sent[request_id] = _Sent(best, prompt_tokens + TOKENS_PER_REQUEST, self._clock())
        return best

    def finished(self, request_id: str) -> None:
        """The request has ended, wherever it went."""
        self._sent.pop(request_id, None)

    def loads(self, reports: Mapping[WorkerT, WorkerReport]) -> dict[WorkerT, int]:
        """Tokens that each worker still has to compute, as far as this process knows."""
        loads = {
            worker: report.queued_tokens + TOKENS_PER_REQUEST * report.unfinished for worker, report in reports.items()
        }
        for request_id, sent in list(self._sent.items()):
            report = reports.get(sent.worker)
            if report is None or sent.at < report.taken_at - _TRANSIT_S:
                self._sent.pop(request_id, None)  # the report has it, or its worker is gone
            else:
                loads[sent.worker] += sent.tokens
        return loads
