"""Which attention worker gets a request: the one with the fewest tokens to compute. Plain Python, no Ray, no torch.

A worker reports its queue now and then. What this process has sent it since is added to the report, or a burst would
go to one worker as a whole. Several ingress replicas don't see each other's requests until the next report: each then
compares only two workers that it draws at random, since all of them taking the best at once would swamp it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

REPORT_EVERY_S = 0.5
TOKENS_PER_REQUEST = 64
"""What an unfinished request counts besides its prompt, for its answer; else a worker that only decodes looks idle."""
_REPEAT_S = 5.0
"""A report that says nothing new is repeated so often, and not more, since Serve tells every change to everybody."""
_TRANSIT_S = 0.1
"""A request sent so shortly before a report may not have been in it."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's queue at one moment."""

    taken_at: float
    """Seconds of the wall clock, since it is compared across processes."""
    queued_tokens: int
    """Prompt tokens still to be computed."""
    unfinished: int
    """Requests that run or wait."""

    def after(self, last: WorkerReport | None) -> WorkerReport:
        """This report, or the last one as long as it will do."""
        if last is None or self.taken_at - last.taken_at > _REPEAT_S:
            return self
        return last if (last.queued_tokens, last.unfinished) == (self.queued_tokens, self.unfinished) else self

    def to_dict(self) -> dict[str, float]:
        """The form in which it travels."""
        return {"taken_at": self.taken_at, "queued_tokens": self.queued_tokens, "unfinished": self.unfinished}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self | None:
        """Inverse of `to_dict`; None for a worker that has nothing to report."""
        try:
            return cls(float(data["taken_at"]), int(data["queued_tokens"]), int(data["unfinished"]))
        except (KeyError, TypeError, ValueError):
            return None


WorkerT = TypeVar("WorkerT")


@dataclass(frozen=True, slots=True)
class _Sent(Generic[WorkerT]):
    worker: WorkerT
    tokens: int
    at: float


class QueuedTokens(Generic[WorkerT]):
    """Estimates each worker's queue. Methods may be called from several threads."""

    def __init__(
        self, alone: bool = True, clock: Callable[[], float] = time.time, rng: random.Random | None = None
    ) -> None:
        """`alone`: no other process sends requests to the same workers."""
        self._alone = alone
        self._clock = clock
        self._rng = rng or random.Random()
        self._sent: dict[str, _Sent[WorkerT]] = {}

    def choose(self, reports: Mapping[WorkerT, WorkerReport], request_id: str, prompt_tokens: int) -> WorkerT:
        """Pick a worker for a request, and count the request as sent to it."""
        loads = self.loads(reports)
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


def known_reports(stats: Mapping[WorkerT, Mapping[str, Any]]) -> dict[WorkerT, WorkerReport]:
    """The reports of those that gave one. A worker without has no seat, has failed, or has only just started."""
    return {worker: report for worker, data in stats.items() if (report := WorkerReport.from_dict(data))}
