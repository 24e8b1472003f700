"""The ratio of two speeds from interleaved pairs: its median, an interval without assumptions, and a verdict."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

_NARROW = 0.05
"""An interval at most this wide that holds 1 says that the two are equally fast."""


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median of what the values are drawn from, with at least this confidence.

    Of n values, k are below the median with probability C(n, k) / 2**n whatever their distribution. Fewer than six
    cannot be that sure, and give their range.
    """
    ordered, count = sorted(values), len(values)
    outside, cut = 2 / 2**count, 0
    while outside + 2 * math.comb(count, cut + 1) / 2**count <= 1 - confidence:
        cut += 1
        outside += 2 * math.comb(count, cut) / 2**count
    return ordered[cut], ordered[-1 - cut]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`passed`: as fast as wanted. `final`: more pairs would not help."""

    text: str
    passed: bool
    final: bool


@dataclass(slots=True)
class Ratios:
    """Seconds of the two in every pair; a ratio above 1 says that AFTER is faster."""

    HEADER: ClassVar[str] = (
        "| cell | pairs | ms before | ms after | AFTER : BEFORE, median | 95 % interval | verdict |\n"
        "|---|---|---|---|---|---|---|"
    )
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def add(self, before: float, after: float) -> None:
        """Keep the seconds of a pair."""
        self.before.append(before)
        self.after.append(after)

    @property
    def values(self) -> list[float]:
        """Speed of AFTER over that of BEFORE, pair by pair."""
        return [before / after for before, after in zip(self.before, self.after, strict=True)]

    def verdict(self, target: float) -> Verdict:
        """Passed with a median of `target` or, where no gain is wanted, with a narrow interval that holds 1."""
        low, high = median_interval(self.values)
        if statistics.median(self.values) >= target:
            return Verdict("met", passed=True, final=True)
        narrow = high - low <= _NARROW
        if narrow and low <= 1 <= high and target <= 1:
            return Verdict("met: equal", passed=True, final=True)
        if narrow or high < target:
            return Verdict(f"MISSED, wanted {target:g}", passed=False, final=True)
        return Verdict("UNDECIDED: more pairs", passed=False, final=False)

    def row(self, target: float) -> str:
        """Cells of the table after the first; times are medians."""
        low, high = median_interval(self.values)
        times = [f"{statistics.median(side) * 1e3:.1f}" for side in (self.before, self.after)]
        shown = [str(len(self.before)), *times, f"{statistics.median(self.values):.3f}", f"{low:.3f} to {high:.3f}"]
        return " | ".join([*shown, self.verdict(target).text])
