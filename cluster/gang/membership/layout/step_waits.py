"""For how much of their time in steps attention workers wait for experts, by what they report of where steps take it.

The worker that waits least counts: experts begin once the rows of all have come, so that whoever computes less than the
others waits for these, too, which no shard more would make shorter. What is reported late or not at all counts for
nothing: a worker's time is that between its own reports, once a step has ended in it. Plain data, no clock; all times
are in seconds of one clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from divisi.cluster.gang.membership.layout.wait_policy import Window
from divisi.cluster.gang.membership.status import Stats

WINDOW_S = 5.0
_OFTEN = 0.5
"""Of the busiest worker's time in steps: who was in fewer of them does not tell what is waited for in the others."""
_WAITING = "experts"
"""The part of a step in which experts elsewhere are waited for, and the rows of other workers on their way there."""
_UNFINISHED = ("running", "waiting")


@dataclass(frozen=True, slots=True)
class _Report:
    steps: float
    step_s: float
    wait_s: float


@dataclass(slots=True)
class StepWaits:
    """One window after the other."""

    _since: float | None = None
    _first: dict[str, _Report] = field(default_factory=dict)
    """Of the window, by worker."""
    _last: dict[str, _Report] = field(default_factory=dict)
    _unfinished: dict[str, bool] = field(default_factory=dict)
    """Whether each had something to do when it was last heard of."""

    def clear(self) -> None:
        """Something is under way: what was measured of this window is not to be compared with what comes."""
        self._since, self._first, self._last = None, {}, {}

    def report(self, who: str, stats: Stats) -> None:
        """A worker's totals."""
        parts = stats.get("step_seconds")
        if isinstance(parts, Mapping):
            report = self._last[who] = _Report(_number(stats, "steps"), sum(parts.values()), parts.get(_WAITING, 0.0))
            self._first.setdefault(who, report)
            self._unfinished[who] = any(_number(stats, name) for name in _UNFINISHED)

    def window(self, workers: Collection[str], now: float) -> Window | None:
        """What these have measured, once that is long enough; the next window begins then."""
        if self._since is None:
            self._since = now
            return None
        reports = [(self._first[who], self._last[who]) for who in workers if who in self._last]
        pairs = [(first, last) for first, last in reports if last.steps > first.steps]
        if now - self._since < WINDOW_S or (not pairs and any(map(self._unfinished.get, workers))):
            return None
        window, self._since = _least_wait(pairs, now - self._since), now
        self._unfinished = {who: some for who, some in self._unfinished.items() if who in workers}
        self._first |= {who: last for who, last in self._last.items() if last.steps > self._first[who].steps}
        return window


def _least_wait(pairs: Sequence[tuple[_Report, _Report]], seconds: float) -> Window:
    """Of the worker whose share was the least; of each the first report and the last."""
    spent = [Window(seconds, last.step_s - first.step_s, last.wait_s - first.wait_s) for first, last in pairs]
    busiest_s = max((each.step_s for each in spent), default=0.0)
    often = (each for each in spent if each.step_s >= _OFTEN * busiest_s)
    least = min(often, key=lambda each: each.share, default=Window(seconds))
    return replace(least, busiest_s=busiest_s)


def _number(stats: Stats, name: str) -> float:
    value = stats.get(name, 0.0)
    return 0.0 if isinstance(value, Mapping) else value
