"""Where a step's time goes, measured in laps."""

from __future__ import annotations

from time import perf_counter
from typing import Literal, Protocol

Part = Literal["scheduler", "mixer", "router", "dispatch", "shared", "experts", "draft", "sampling", "other"]


class TimedApart(Protocol):
    """Something that times its own parts."""

    def take_seconds(self) -> dict[str, float]:
        """What each has taken since the last call."""
        ...


class Stopwatch:
    """Adds up seconds per part of a step. One reading of the clock per lap, so it is always on."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._apart: dict[TimedApart, float] = {}
        """Seconds whose parts are not asked for yet."""
        self._last = perf_counter()
        self.seconds = 0.0
        """Over all parts."""

    def start(self) -> None:
        """Begin a stretch: what passed since the last lap belongs to no part."""
        self._last = perf_counter()

    def lap(self, part: Part) -> None:
        """Charge the time since the last lap (or start) to ``part``."""
        now = perf_counter()
        self._totals[part] = self._totals.get(part, 0.0) + now - self._last
        self.seconds += now - self._last
        self._last = now

    def lap_of(self, parts: TimedApart) -> None:
        """Charge the time since the last lap to what was timed by itself meanwhile: to which parts is asked later."""
        now = perf_counter()
        self._apart[parts] = self._apart.get(parts, 0.0) + now - self._last
        self.seconds += now - self._last
        self._last = now

    def totals(self) -> dict[str, float]:
        """Seconds per part since construction."""
        for parts, whole in self._apart.items():
            spent = parts.take_seconds()
            spent["other"] = spent.get("other", 0.0) + whole - sum(spent.values())
            for part, seconds in spent.items():
                self._totals[part] = self._totals.get(part, 0.0) + seconds
        self._apart.clear()
        return dict(self._totals)
