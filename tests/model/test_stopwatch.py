"""Seconds by part, some of which are asked for only when somebody wants to know."""

from __future__ import annotations

import pytest

from divisi.model import stopwatch as module
from divisi.model.stopwatch import Stopwatch


class _Passes:
    def __init__(self) -> None:
        self.asked = 0
        self.spent = {"mixer": 2.0, "experts": 1.0, "other": 0.5}

    def take_seconds(self) -> dict[str, float]:
        self.asked += 1
        spent, self.spent = self.spent, dict.fromkeys(self.spent, 0.0)
        return dict(spent)


def test_parts_that_were_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they leave of the lap was something else; each second counts once."""
    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    watch, passes = Stopwatch(), _Passes()
    watch.start()
    now[0] = 3.0
    watch.lap("scheduler")
    now[0] = 5.0
    watch.lap_of(passes)
    now[0] = 7.5
    watch.lap_of(passes)
    assert passes.asked == 0
    wanted = {"scheduler": 3.0, "mixer": 2.0, "experts": 1.0, "other": 1.5}
    assert watch.totals() == pytest.approx(wanted)
    assert watch.totals() == pytest.approx(wanted)
    assert watch.seconds == pytest.approx(7.5)
