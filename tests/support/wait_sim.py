"""A toy gang under the policy of expert shards, second by second: a step is attention, the wire, and experts by their
number, each with seeded noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from divisi.cluster.gang.membership.layout.autoscaling import ExpertAutoscaling, Now
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule

WORKERS = ("w0", "w1")


@dataclass(frozen=True)
class Load:
    """Seconds of a step, with one shard, and how many steps are asked for a second; None: one after the other."""

    attention_s: float
    experts_s: float
    wire_s: float = 0.0
    """Waited for, whatever the number of shards."""
    steps: float | None = None
    lighter_s: float = 0.0
    """So much less attention has the second worker, whose rows wait for the first one's."""

    def wait_s(self, shards: int) -> float:
        return self.experts_s / shards + self.wire_s

    def share(self, shards: int) -> float:
        return self.wait_s(shards) / (self.attention_s + self.wait_s(shards))

    def busy(self, shards: int) -> float:
        return min((self.attention_s + self.wait_s(shards)) * self.steps, 1.0) if self.steps is not None else 1.0


IDLE = Load(1.0, 1.0, steps=0.0)


class ToyGang:
    """Two workers, and as many shards as the policy wants."""

    def __init__(
        self, rule: WaitRule, shards: int, seed: int, loads_s: float = 5.0, noise: float = 0.02, there: bool = True
    ) -> None:
        """`loads_s`: how long a change takes; `there`: whether it ever comes about."""
        self.policy, self.rng, self.noise = ExpertAutoscaling(rule), random.Random(seed), noise
        self.now, self.served, self.wanted, self.loads_s, self.there = 0.0, shards, shards, loads_s, there
        self.changes: list[tuple[float, int, str]] = []
        """That the policy has asked for: when, how many, why."""
        self._there_at, self._steps = 0.0, 0
        self._in_steps = dict.fromkeys(WORKERS, 0.0)
        self._waited = dict.fromkeys(WORKERS, 0.0)

    def run(self, seconds: int, load: Load, until: Callable[[], bool] = lambda: False) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self._serve(load)
            if self.wanted != self.served and self.there and self.now >= self._there_at:
                self.served = self.wanted
            settled = self.wanted == self.served
            change = self.policy.look(Now(self.served, self.wanted, WORKERS, settled), self.now)
            if change is not None:
                self.changes.append((self.now, change.shards, change.why))
                self.ask(change.shards)
            if until():
                return

    def ask(self, shards: int) -> None:
        """So many are to be there, whoever wants it."""
        self.wanted, self._there_at = shards, self.now + self.loads_s

    def numbers(self) -> list[int]:
        return [shards for _, shards, _ in self.changes]

    def _serve(self, load: Load) -> None:
        wait, attention, busy = load.wait_s(self.served), load.attention_s, load.busy(self.served)
        self._steps += busy > 0
        for who, lighter in zip(WORKERS, (0.0, load.lighter_s), strict=True):
            noisy = wait * self.rng.gauss(1.0, self.noise)
            self._in_steps[who] += busy
            self._waited[who] += busy * (noisy + lighter) / (noisy + attention)
            parts = {"mixer": self._in_steps[who] - self._waited[who], "experts": self._waited[who]}
            self.policy.report(who, {"step_seconds": parts, "steps": self._steps, "running": float(busy > 0)})
