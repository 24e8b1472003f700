"""How much load each virtual shard has, by what shards report that they have counted. Plain data, no clock.

Shards report at times of their own, so that what each has counted is taken over the time between its own reports.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

WINDOW_S = 5.0
ROWS_PER_LEAF = 128
"""A window has at least as many on average: with a few shards' worth of them, chance makes a few percent."""

Rows = Mapping[str, float]
"""Counted so far, by virtual shard."""


@dataclass(slots=True)
class LeafLoads:
    """One window after the other, of one layout."""

    leaves: int
    _first: dict[str, tuple[float, Rows]] = field(default_factory=dict)
    """Of the window, by who reports: when, and what."""
    _last: dict[str, tuple[float, Rows]] = field(default_factory=dict)

    def clear(self) -> None:
        """The layout is another, or nobody serves: what was counted is not to be compared with what comes."""
        self._first, self._last = {}, {}

    def report(self, who: str, rows: Rows, now: float) -> None:
        """A shard has counted so much since it began."""
        self._first.setdefault(who, (now, rows))
        self._last[who] = now, rows

    def window(self, members: Collection[str]) -> list[float] | None:
        """Rows per second by virtual shard, once all those who serve have reported for long enough; the next window
        begins then."""
        spans = {who: self._last[who][0] - self._first[who][0] for who in members if who in self._last}
        if len(spans) < len(members) or min(spans.values()) < WINDOW_S:
            return None
        load, rows = [0.0] * self.leaves, 0.0
        for who, seconds in spans.items():
            before = self._first[who][1]
            for leaf, count in self._last[who][1].items():
                new = max(count - before.get(leaf, 0.0), 0.0)
                load[int(leaf)] += new / seconds
                rows += new
        if rows < ROWS_PER_LEAF * self.leaves:
            return None
        self._first = dict(self._last)
        return load
