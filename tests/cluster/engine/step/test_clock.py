from __future__ import annotations

import pytest
import torch

from divisi.cluster.engine.step import clock
from divisi.cluster.engine.step.clock import PassClock


def test_each_pass_has_its_time_and_a_step_that_begins_again_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 7.0, 7.25, 8.0])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(now))
    passes = PassClock(torch.device("cpu"))
    passes.start()
    passes.mark()
    passes.start()
    passes.mark()
    passes.mark()
    assert passes.seconds() == [0.25, 0.75]


def test_passes_that_were_one_call_have_their_own_times_and_the_first_what_precedes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([1.0, 3.0])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(now))
    passes = PassClock(torch.device("cpu"))
    passes.start()
    passes.mark_all([0.5, 0.25, 0.125])
    assert passes.seconds() == [1.625, 0.25, 0.125]


def test_without_passes_there_are_no_times() -> None:
    passes = PassClock(torch.device("cpu"))
    assert passes.seconds() == []
    passes.start()
    assert passes.seconds() == []
