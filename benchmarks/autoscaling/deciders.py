"""Who says how many attention workers there are to be: nobody, Divisi's policy, or Serve's default one."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Protocol

from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig

from divisi.deploy.application.queue_policy import QueueDepth, QueueRule


@dataclass(frozen=True, slots=True)
class Seen:
    """What can be known at a moment."""

    now: float
    queued_tokens: float
    """Of the workers, as they report it: prompts, and something for each unfinished answer."""
    refused_tokens: float
    requests: int
    """Inside, and waiting to come again: where nothing is refused, both would be Serve's ongoing requests."""
    workers: int
    """Counting those that start."""


class Decider(Protocol):
    """One way."""

    first: int
    """With how many the gang begins."""

    def decide(self, seen: Seen) -> int:
        """How many there are to be."""
        ...


class Fixed:
    """Always as many."""

    def __init__(self, workers: int) -> None:
        self.first = workers

    def decide(self, seen: Seen) -> int:
        """See Decider."""
        return self.first


class ByQueue:
    """The product's policy, as Serve calls it."""

    def __init__(self, rule: QueueRule) -> None:
        self.first = rule.least
        self._now = 0.0
        self._policy = QueueDepth(lambda: self._now, **asdict(rule))

    def decide(self, seen: Seen) -> int:
        """See Decider."""
        self._now = seen.now
        told = {"queued_tokens": seen.queued_tokens, "refused_tokens": seen.refused_tokens}
        metrics = {name: {"all": [SimpleNamespace(value=value)]} for name, value in told.items()}
        context = SimpleNamespace(raw_metrics=metrics, running_replicas=["all"], target_num_replicas=seen.workers)
        return self._policy(context)[0]


class ByServe:
    """Ray Serve's default policy with its own arithmetic and delays: ongoing requests, averaged."""

    def __init__(self, most: int, target_requests: float) -> None:
        self.first = 1
        self._config = AutoscalingConfig(max_replicas=most, target_ongoing_requests=target_requests)
        self._state: dict[str, object] = {}
        self._seen: deque[tuple[float, int]] = deque()

    def decide(self, seen: Seen) -> int:
        """See Decider."""
        self._seen.append((seen.now, seen.requests))
        while self._seen[0][0] < seen.now - self._config.look_back_period_s:
            self._seen.popleft()
        mean = sum(requests for _, requests in self._seen) / len(self._seen)
        desired = mean / self._config.get_target_ongoing_requests()
        scaled = _apply_scaling_factors(desired, seen.workers, self._config)
        bounded = min(max(scaled, self._config.min_replicas), self._config.max_replicas)
        found, self._state = _apply_delay_logic(bounded, seen.workers, self._config, self._state, _now=seen.now)
        return found
