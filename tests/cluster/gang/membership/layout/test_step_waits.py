"""What attention workers report of their steps becomes windows."""

from __future__ import annotations

from divisi.cluster.gang.membership.layout.step_waits import WINDOW_S, StepWaits
from divisi.cluster.gang.membership.layout.wait_policy import Window

BOTH = ("a", "b")


def report(
    waits: StepWaits, who: str, mixer: float, experts: float, running: int = 1, steps: float | None = None
) -> None:
    """A worker's totals; with each that is higher than the last it has ended a step, unless told otherwise."""
    parts = {"mixer": mixer, "experts": experts}
    ended = mixer + experts if steps is None else steps
    waits.report(who, {"step_seconds": parts, "steps": ended, "running": running, "waiting": 0})


def test_the_time_is_that_between_its_own_reports_of_who_waits_least() -> None:
    waits = StepWaits()
    report(waits, "a", 100.0, 50.0)
    assert waits.window(BOTH, 0.0) is None
    report(waits, "a", 101.0, 52.0)
    report(waits, "b", 7.0, 7.0)  # its first: what was before is not known
    assert waits.window(BOTH, WINDOW_S - 1) is None
    report(waits, "b", 9.0, 7.5)
    assert waits.window(BOTH, WINDOW_S) == Window(WINDOW_S, step_s=2.5, wait_s=0.5, busiest_s=3.0)
    report(waits, "b", 9.5, 8.5)
    assert waits.window(BOTH, 2 * WINDOW_S) == Window(WINDOW_S, step_s=1.5, wait_s=1.0, busiest_s=1.5)


def test_who_is_in_few_of_the_steps_tells_nothing_of_the_others() -> None:
    waits = StepWaits()
    waits.window(BOTH, 0.0)
    for who in BOTH:
        report(waits, who, 0.0, 0.0)
    report(waits, "a", 1.0, 3.0)
    report(waits, "b", 1.5, 0.4)
    assert waits.window(BOTH, WINDOW_S) == Window(WINDOW_S, 4.0, 3.0, 4.0)


def test_who_is_gone_counts_no_more() -> None:
    waits = StepWaits()
    waits.window(BOTH, 0.0)
    for who in BOTH:
        report(waits, who, 0.0, 0.0)
        report(waits, who, 1.0, 1.0)
    assert waits.window(("a",), WINDOW_S) == Window(WINDOW_S, 2.0, 1.0, 2.0)


def test_what_was_measured_before_something_was_under_way_is_forgotten() -> None:
    waits = StepWaits()
    waits.window(BOTH, 0.0)
    report(waits, "a", 0.0, 0.0)
    report(waits, "a", 1.0, 9.0)
    waits.clear()
    waits.window(BOTH, 1.0)
    report(waits, "a", 2.0, 18.0)
    report(waits, "a", 3.0, 18.0)
    assert waits.window(BOTH, 1.0 + WINDOW_S) == Window(WINDOW_S, 1.0, 0.0, 1.0)


def test_who_has_something_to_do_and_says_nothing_is_not_idle() -> None:
    waits = StepWaits()
    report(waits, "a", 0.0, 0.0)
    waits.clear()
    waits.window(BOTH, 0.0)
    assert waits.window(BOTH, 3 * WINDOW_S) is None, "it is in a long step"
    report(waits, "a", 4.0, 3.0, steps=5)
    assert waits.window(BOTH, 4 * WINDOW_S) is None, "its first word"
    report(waits, "a", 5.0, 5.0, steps=5)
    assert waits.window(BOTH, 5 * WINDOW_S) is None, "no step has ended"
    report(waits, "a", 6.0, 7.0, steps=6)
    assert waits.window(BOTH, 6 * WINDOW_S) == Window(6 * WINDOW_S, 6.0, 4.0, 6.0)


def test_what_planning_costs_an_idle_worker_is_no_step() -> None:
    waits = StepWaits()
    waits.window(BOTH, 0.0)
    report(waits, "a", 4.0, 4.0, steps=5)
    report(waits, "a", 4.1, 4.0, steps=5, running=0)
    assert waits.window(BOTH, WINDOW_S) == Window(WINDOW_S)


def test_what_other_ranks_tell_is_passed_over() -> None:
    waits = StepWaits()
    waits.window((), 0.0)
    waits.report("e0", {"weight_bytes": 1.0})
    assert waits.window((), WINDOW_S) == Window(WINDOW_S)
