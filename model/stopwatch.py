"""Where a step's time goes, measured in laps."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Literal

Part = Literal["scheduler", "mixer", "router", "dispatch", "shared", "experts", "draft", "sampling", "other"]


class Stopwatch:
    """Adds up seconds per part of a step. One reading of the clock per lap, so it is always on."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
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

    def split(self, parts: Sequence[str], seconds: Sequence[float]) -> None:
        """Charge the time since the last lap to several parts; what these leave of it was `other`."""
        for part, spent in zip(parts, seconds, strict=True):
            self._totals[part] = self._totals.get(part, 0.0) + spent
            self.seconds += spent
            self._last += spent
        self.lap("other")

    def totals(self) -> dict[str, float]:
        """Seconds per part since construction."""
        return dict(self._totals)
