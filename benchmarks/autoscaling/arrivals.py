"""Requests as they come: made up, seeded, or read from the log of a server."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HOURS = 1.0
_PROMPT, _ANSWER = 300, 150


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes (seconds), and the tokens of its prompt and its answer."""

    at: float
    prompt: int
    answer: int


Rate = Callable[[float], float]
"""By the fraction of the time that has passed, the fraction of the peak's requests per second."""


def diurnal(passed: float) -> float:
    """A day: from a tenth at night to all of it at noon."""
    return 0.55 - 0.45 * math.cos(2 * math.pi * passed)


def bursts(passed: float) -> float:
    """A fifth, and all of it in twelve spells of a fiftieth of the time."""
    return 1.0 if passed * 12 % 1 > 0.76 else 0.2


def flash_crowd(passed: float) -> float:
    """A tenth; after a third of the time all of it at once, which then fades."""
    return 0.1 if passed < 1 / 3 else max(0.1, math.exp(-(passed - 1 / 3) * 8))


PATTERNS: dict[str, Rate] = {"diurnal": diurnal, "bursts": bursts, "flash crowd": flash_crowd}


def made(pattern: Rate, peak: float, seed: int, hours: float = HOURS) -> list[Arrival]:
    """A Poisson process with `peak` requests a second at most, of prompts and answers whose lengths vary a lot."""
    rng = random.Random(f"{pattern.__name__} {seed}")
    seconds, now = hours * 3600, 0.0
    found = []
    while (now := now + rng.expovariate(peak)) < seconds:
        if rng.random() < pattern(now / seconds):
            found.append(Arrival(now, _length(rng, _PROMPT), _length(rng, _ANSWER)))
    return found


def _length(rng: random.Random, mean: int) -> int:
    """Exponential: many short, few long."""
    return max(1, min(round(rng.expovariate(1 / mean)), 8 * mean))


def recorded(log: Path) -> list[Arrival]:
    """The answered requests in a server's JSON log, in the order in which they came; the first at 0."""
    found = sorted(_read(log), key=lambda arrival: arrival.at)
    if not found:
        raise ValueError(f"{log}: no line of an answered request in it; the server's log.format has to be json")
    first = found[0].at
    return [Arrival(arrival.at - first, arrival.prompt, arrival.answer) for arrival in found]


def _read(log: Path) -> Iterator[Arrival]:
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            fields = json.loads(line)
            if fields.get("status") == 200 and (answer := fields.get("completion_tokens")):
                ended = datetime.fromisoformat(fields["time"]).timestamp()
                yield Arrival(ended - fields["duration_s"], fields["prompt_tokens"], answer)
        except (ValueError, AttributeError, KeyError):
            continue  # a line of something else
