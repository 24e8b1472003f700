"""The plan of blows: what is struck when, and how, from a seed alone. Plain data: no processes, no clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

KINDS = ("worker", "shard", "coordinator", "gang", "ingress", "proxy")
SEVERAL = ("worker", "shard", "ingress")
"""Kinds of which there are two."""
KILLED = 0.7
"""The share of SIGKILL; the others are SIGSTOP, and SIGCONT after a while."""
APART_S = (2.0, 6.0)
STOPPED_S = (0.2, 15.0)
BOTH = 0.1
"""How often both of a kind are struck at once."""


@dataclass(frozen=True, slots=True)
class Blow:
    """One or several processes of a kind are killed, or stopped for a while."""

    at_s: float
    """Since the first blow could have come."""
    kind: str
    stopped_s: float | None
    """None: killed."""
    count: int
    """Processes struck at once."""
    draw: float
    """In [0, 1): which of those that there are."""

    def __str__(self) -> str:
        how = "SIGKILL" if self.stopped_s is None else f"SIGSTOP of {self.stopped_s:.1f} s"
        return f"{self.at_s:6.1f} s: {how} to {'both' if self.count > 1 else 'a'} {self.kind}"


def plan(seed: int, count: int, kinds: Sequence[str] = KINDS, apart_s: tuple[float, float] = APART_S) -> list[Blow]:
    """So many blows, in order of time: each kind as often as the others, `KILLED` of them deadly, both as exactly as
    whole numbers allow."""
    rng = random.Random(seed)
    struck = list(islice(cycle(kinds), count))
    deadly = [index < round(KILLED * count) for index in range(count)]
    rng.shuffle(struck)
    rng.shuffle(deadly)
    blows, at_s = [], 0.0
    for kind, kills in zip(struck, deadly, strict=True):
        at_s += rng.uniform(*apart_s)
        stopped_s = None if kills else rng.uniform(*STOPPED_S)
        both = kind in SEVERAL and rng.random() < BOTH
        blows.append(Blow(at_s, kind, stopped_s, 2 if both else 1, rng.random()))
    return blows
