"""How many attention workers there are to be, by what waits for them. Knows no Ray.

Imports the standard library only: Serve carries this module by value into its controller, and asks it ten times a
second. Tokens that wait are spread over workers; how many that makes is followed once it has been so for a while, and
then as far as all of that time has wanted it: a short burst starts no worker, a short lull ends none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FEWER = 1 / 8
"""So large a part of the workers has to be needless before any is ended: with each the gang begins an epoch."""
Change = tuple[float, int]
"""From that time on (seconds of a monotonic clock), so many workers were wanted."""


@dataclass(frozen=True)
class QueueRule:
    """The settings of it; see `AutoscalingSettings`."""

    least: int
    most: int
    tokens_per_worker: int
    upscale_delay_s: float
    downscale_delay_s: float


def wanted(tokens: float, rule: QueueRule) -> int:
    """The workers for so many tokens."""
    return min(max(math.ceil(tokens / rule.tokens_per_worker), rule.least), rule.most)


def decide(history: Sequence[Change], now: float, workers: int, rule: QueueRule) -> int:
    """How many workers there are to be, where there are `workers`, counting those that start.

    `history`: in order of time; each change holds until the next, the last one until `now`.
    """
    more = _during(history, now, rule.upscale_delay_s)
    if more and min(more) > workers:
        return min(more)
    fewer = _during(history, now, rule.downscale_delay_s)
    if fewer and (most := max(fewer)) < workers and (most == rule.least or workers - most >= _FEWER * workers):
        return most
    return workers


def _during(history: Sequence[Change], now: float, seconds: float) -> list[int]:
    """What was wanted at some time in the last `seconds`; empty where that is not known of all of them."""
    begin = now - seconds
    before = [number for at, number in history if at <= begin]
    return [before[-1], *(number for at, number in history if at > begin)] if before else []


def waiting_tokens(stats: Mapping[str, Mapping[Any, Sequence[Any]]], replicas: Sequence[Any]) -> float | None:
    """The tokens that wait for the gang; None where no worker has said anything.

    `stats`: by name and replica, points in time with a `value`. Each worker tells its own queue, and what the whole
    gang refuses.
    """
    newest = {
        name: [points[-1].value for replica in replicas if (points := by_replica.get(replica))]
        for name, by_replica in stats.items()
    }
    queued, refused = newest.get("queued_tokens", []), newest.get("refused_tokens", [])
    return sum(queued) + max(refused, default=0.0) if queued else None


class QueueDepth:
    """The policy as Serve calls it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, **rule: Any) -> None:
        """`rule`: the fields of QueueRule."""
        self._rule = QueueRule(**rule)
        self._clock = clock
        self._history: list[Change] = []

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's AutoscalingContext -> the number of replicas, and a state that is not used."""
        tokens = waiting_tokens(context.raw_metrics or {}, context.running_replicas)
        if tokens is None:  # nobody has said anything
            return context.target_num_replicas, {}
        now = self._clock()
        self._note(now, wanted(tokens, self._rule))
        return decide(self._history, now, context.target_num_replicas, self._rule), {}

    def _note(self, now: float, number: int) -> None:
        if not self._history or self._history[-1][1] != number:
            self._history.append((now, number))
        begin = now - max(self._rule.upscale_delay_s, self._rule.downscale_delay_s)
        while len(self._history) > 1 and self._history[1][0] <= begin:
            del self._history[0]
