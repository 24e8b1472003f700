"""What is simulated: a pattern or a record of arrivals, and the workers that its peak needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from divisi.benchmarks.autoscaling.arrivals import PATTERNS, Arrival, made
from divisi.benchmarks.autoscaling.gang import Model

PEAK_PER_WORKER = 0.75
"""Requests a second, of the patterns' lengths: four fifths of what a worker of the model can do."""
SIZES = (4, 16, 64)
_MINUTE = 60.0


@dataclass(frozen=True)
class Case:
    """Arrivals, and the workers that their peak needs."""

    name: str
    arrivals: Sequence[Arrival]
    size: int
    model: Model
    seed: int = 0
    recorded: bool = False
    warm: bool = False
    """Policies begin with the workers for the peak, as if they had had that load before, and not with one."""

    @property
    def end(self) -> float:
        """When the last request comes."""
        return self.arrivals[-1].at if self.arrivals else 0.0

    @property
    def peak(self) -> float:
        """Requests a second: of a pattern at its peak, of what was recorded in its busiest minute."""
        return max(rate for _, rate in self.rates()) if self.recorded else PEAK_PER_WORKER * self.size

    def rates(self) -> list[tuple[float, float]]:
        """Requests a second by minute."""
        counts: dict[int, int] = {}
        for arrival in self.arrivals:
            minute = int(arrival.at / _MINUTE)
            counts[minute] = counts.get(minute, 0) + 1
        return [(minute * _MINUTE, counts.get(minute, 0) / _MINUTE) for minute in range(int(self.end / _MINUTE) + 1)]


def made_cases(sizes: Sequence[int], hours: float, seed: int, model: Model) -> Iterator[Case]:
    """All patterns in all sizes."""
    for size in sizes:
        for name, pattern in PATTERNS.items():
            yield Case(name, made(pattern, size * PEAK_PER_WORKER, seed, hours), size, model, seed)


def recorded_cases(arrivals: Sequence[Arrival], sizes: Sequence[int], seed: int, model: Model) -> Iterator[Case]:
    """The first size gets all requests, one that is an nth of it every nth, as one of n gangs that take turns does.

    Each begins with one worker, and again with those for the peak. Raises ValueError.
    """
    if (end := arrivals[-1].at) < _MINUTE:
        raise ValueError(
            f"--log: its {len(arrivals)} requests came within {end:.1f} s, and its peak is that of a whole minute; "
            "give a longer record"
        )
    for size in sizes:
        every, rest = divmod(sizes[0], size)
        if rest:
            raise ValueError(f"--log-size: {sizes[0]} workers are not a number of gangs of {size}")
        part = arrivals[::every]
        yield Case("recorded, begun with 1", part, size, model, seed, recorded=True)
        yield Case(f"recorded, begun with {size}", part, size, model, seed, recorded=True, warm=True)
