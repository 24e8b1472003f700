"""The end of a gang, on a clock that the test moves."""

from __future__ import annotations

from divisi.cluster.gang.drain import Drain


def test_a_drain_counts_down_and_can_only_be_shortened() -> None:
    now = 0.0
    drain = Drain(lambda: now)
    assert drain.report("a", 3) is None
    assert not drain.begun
    drain.begin(10)
    assert drain.begun
    now = 4.0
    assert drain.report("a", 2) == 6
    drain.begin(20)
    assert drain.report("a", 2) == 6
    drain.begin(0)
    assert drain.report("a", 2) == 0


def test_open_answers_of_all_replicas_until_they_fall_silent() -> None:
    now = 0.0
    drain = Drain(lambda: now)
    drain.report("a", 3)
    now = 3.0
    drain.report("b", 2)
    assert drain.open_answers() == 5
    drain.report("b", 1)
    assert drain.open_answers() == 4
    now = 6.0
    assert drain.open_answers() == 1
    drain.report("b", 0)
    assert drain.open_answers() == 0
