from __future__ import annotations

import pytest
import torch

from divisi.cluster.engine.step import clock
from divisi.cluster.engine.step.clock import PassClock


def test_each_pass_has_its_time_and_a_step_that_begins_again_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.25, 1.25, 1.5, 6.0, 7.0, 7.0, 7.25, 8.0])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(now))
    passes = PassClock(torch.device("cpu"))
    passes.start()
    passes.begin()
    passes.mark()
    passes.start()
    passes.begin()
    passes.mark()
    passes.mark()
    assert passes.seconds() == [0.25, 0.75]
    assert passes.laid_out_s == 1.0


def test_without_passes_there_are_no_times() -> None:
    passes = PassClock(torch.device("cpu"))
    assert passes.seconds() == []
    passes.start()
    assert passes.seconds() == []
    assert passes.laid_out_s == 0.0
