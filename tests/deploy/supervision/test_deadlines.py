"""When the driver has to be gone, for every order in every situation."""

from __future__ import annotations

import pytest

from divisi.deploy.supervision.deadlines import TAKE_DOWN_S, Deadlines

GRACE_S = 20.0


def test_nothing_ordered_no_deadline() -> None:
    assert Deadlines(GRACE_S).end is None
    assert Deadlines(GRACE_S, answers_open=True, joined=True).end is None


def test_before_there_is_a_cluster_nothing_is_worth_time() -> None:
    deadlines = Deadlines(GRACE_S)
    deadlines.stop(100.0)
    assert deadlines.end == 100.0


@pytest.mark.parametrize(("answers_open", "grace"), [(True, GRACE_S), (False, 0.0)])
def test_only_open_answers_are_worth_the_grace(answers_open: bool, grace: float) -> None:
    deadlines = Deadlines(GRACE_S, has_ray=True, answers_open=answers_open)
    deadlines.stop(100.0)
    assert deadlines.end == 100.0 + grace + TAKE_DOWN_S


def test_answers_that_are_found_open_after_the_order_still_have_the_grace() -> None:
    deadlines = Deadlines(GRACE_S, has_ray=True)
    deadlines.stop(100.0)
    deadlines.answers_open = True
    assert deadlines.end == 100.0 + GRACE_S + TAKE_DOWN_S


def test_more_orders_to_stop_win_no_time() -> None:
    deadlines = Deadlines(GRACE_S, has_ray=True, answers_open=True)
    deadlines.stop(100.0)
    deadlines.stop(110.0)
    assert deadlines.end == 100.0 + GRACE_S + TAKE_DOWN_S


@pytest.mark.parametrize("answers_open", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_a_second_signal_leaves_time_for_last_words_only(answers_open: bool, joined: bool) -> None:
    deadlines = Deadlines(GRACE_S, True, answers_open, joined)
    deadlines.stop(100.0)
    deadlines.hurry(101.0)
    first = 100.0 + (GRACE_S if answers_open else 0.0) + TAKE_DOWN_S
    assert deadlines.end == min(first, 101.0 + (TAKE_DOWN_S if answers_open or joined else 0.0))


@pytest.mark.parametrize("joined", [True, False])
def test_without_its_front_process_only_a_joined_cluster_is_worth_time(joined: bool) -> None:
    deadlines = Deadlines(GRACE_S, has_ray=True, answers_open=True, joined=joined)
    deadlines.abandon(100.0)
    assert deadlines.end == 100.0 + (TAKE_DOWN_S if joined else 0.0)


def test_taking_down_has_a_deadline_without_an_order_too() -> None:
    deadlines = Deadlines(GRACE_S, answers_open=True)
    deadlines.take_down(100.0)
    assert deadlines.end == 100.0 + TAKE_DOWN_S


def test_every_end_lies_within_the_grace_and_ten_seconds() -> None:
    assert TAKE_DOWN_S < 10
