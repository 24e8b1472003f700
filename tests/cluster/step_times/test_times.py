"""What steps take: between what was measured and past it, and kept up to date."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.step_times.measured import Measured, Reading
from divisi.cluster.step_times.times import StepTimes

FULL = {1: {1: 1.0, 3: 2.0}, 4: {1: 2.0, 3: 6.0}}
"""By sequences and rows of each."""


def test_nothing_is_known_before_both_halves_are() -> None:
    assert not StepTimes().is_known
    assert not StepTimes(Measured(FULL)).is_known
    assert StepTimes(Measured(FULL, {1: 0.5})).is_known


def test_between_and_past_what_was_measured() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5, 4: 0.8}))
    assert times.full(1, 2) == [1.0, 1.5, 2.0]
    assert times.full(4, 8)[8] == 6.0
    assert times.full(2, 2)[0] == pytest.approx(1.0 + 1 / 3), "between one sequence and four"
    assert times.full(2, 2)[2] == pytest.approx(1.5 + (4.0 - 1.5) / 3)
    assert times.full(8, 0)[0] == 4.0, "in proportion to the most that were measured"
    assert times.full(1, 5)[5] == 4.0, "in proportion to the deepest"
    assert times.draft(8) == pytest.approx([0.0, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.6])
    assert times.prefill(12) == 6.0


def test_longer_lists_are_asked_for_later() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}))
    assert times.full(4, 0)[0] == 2.0
    assert times.full(4, 8)[8] == 6.0


def test_times_follow_what_steps_take() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}, Reading(0.01, 0.005, 0.002)))
    for _ in range(240):
        times.note_full(4, 12, 100, 200, 3 * (6.0 + 1.0 + 1.0))
        times.note_drafts((1, 1), 50, [0.25 * (0.5 + 0.05), 0.5 * (0.5 + 0.05)])
    assert times.full(4, 0)[0] == pytest.approx(6.0, rel=0.01)
    assert times.draft(1)[1] == pytest.approx(0.25, rel=0.01)
    assert times.first_draft(1)[1] == pytest.approx(0.125, rel=0.01)
    assert times.reading == pytest.approx((0.03, 0.015, 0.001), rel=0.01)


def test_one_step_that_was_interrupted_says_little() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}))
    times.note_full(1, 1, 0, 0, 500.0)
    assert times.full(1, 0)[0] == pytest.approx(1.0125)
    times.note_full(1, 1, 0, 0, 0.0)
    assert times.full(1, 0)[0] == pytest.approx(1.0, rel=0.05)


def test_a_new_table_takes_the_place_of_the_old_one() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}))
    assert times.full(1, 2)[0] == 1.0
    times.learn(Measured({1: {1: 7.0}}, {1: 1.0}))
    assert times.full(1, 2)[0] == 7.0
    assert times.measured.full == {1: {1: 7.0}}


def test_a_step_unlike_the_one_before_corrects_the_table() -> None:
    """Where the machine is as it was, what takes other than expected was measured wrongly."""
    times = StepTimes(Measured({1: {1: 1.0, 2: 1.2, 6: 9.0}, 4: {1: 2.0, 2: 4.0}}, {1: 0.5}))
    for _ in range(100):
        for _ in range(15):
            times.note_full(1, 1, 0, 0, 1.0)
        times.note_full(1, 6, 0, 0, 3.0)
    full = times.full(1, 5)
    assert full[0] == pytest.approx(1.0, rel=0.1)
    assert full[5] == pytest.approx(3.0, rel=0.1)
    assert times.full(4, 4)[4] == pytest.approx(4.0, rel=0.1), "of others nothing was said"


def test_of_steps_like_the_one_before_every_fourth_is_due() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}))
    assert [times.is_due(1, 3, 100 + step) for step in range(9)] == [True, *[False] * 3, True, *[False] * 3, True]
    assert times.is_due(1, 2, 108)
    assert times.is_due(1, 2, 1000)
    assert not times.is_due(1, 2, 1001)


def test_what_reading_costs_is_found_out_by_steps_that_read_more_or_less() -> None:
    """It was measured while something disturbed the machine: eight times as long for further rows, twice for drafts."""
    times = StepTimes(Measured({1: {1: 1.0, 6: 2.0}}, {1: 0.5}, Reading(0.001, 0.002, 0.0004)))
    for number in range(1200):
        read = (50, 1000)[number // 3 % 2]
        if number % 4:
            times.note_drafts([1] * 5, 5 * read, [0.5 + 0.0002 * read] * 5)
            times.note_full(1, 6, read, 5 * read, 2.0 + 0.001 * read + 0.00025 * 5 * read)
        else:
            times.note_full(1, 1, read, 0, 1.0 + 0.001 * read)
    first, more, draft = times.reading
    assert first + 5 * more == pytest.approx(0.001 + 5 * 0.00025, rel=0.25)
    assert draft == pytest.approx(0.0002, rel=0.25)


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_a_right_table_stays_right_whatever_the_noise(noise: float) -> None:
    """Steps like the one before and others in turn: what the table loses, the factor must not gain."""
    true = {1: 1.0, 2: 1.2, 3: 1.4, 4: 1.6, 6: 2.0}
    times, rng = StepTimes(Measured({1: true}, {1: 0.5})), random.Random(7)
    for number in range(3000):
        rows = 3 + number // 4 % 2
        times.note_full(1, rows, 0, 0, true[rows] * rng.gauss(1.0, noise))
    full = times.full(1, 5)
    for rows, seconds in true.items():
        assert full[rows - 1] == pytest.approx(seconds, rel=0.1)


def test_a_wrong_place_is_corrected_by_each_step_from_where_it_is_then() -> None:
    times = StepTimes(Measured({1: {1: 1.0, 6: 4.0}}, {1: 0.1}))
    for _ in range(8):
        times.note_full(1, 1, 0, 0, 1.0)
        times.note_full(1, 6, 0, 0, 2.0)
    assert times.full(1, 5)[5] == pytest.approx(2.0, rel=0.15)
    assert times.full(1, 5)[5] >= 1.9


def test_disturbed_steps_leave_the_table_nearly_as_it_is() -> None:
    """One in ten takes five times as long; the others as is known."""
    times = StepTimes(Measured({1: {1: 1.0, 6: 2.0}}, {1: 0.5}))
    for number in range(200):
        rows = (1, 6)[number % 2]
        times.note_full(1, rows, 0, 0, (1.0 if rows == 1 else 2.0) * (5 if number % 11 == 0 else 1))
    full = times.full(1, 5)
    assert full[0] == pytest.approx(1.0, rel=0.05)
    assert full[5] == pytest.approx(2.0, rel=0.05)


def test_a_machine_that_becomes_slower_leaves_the_table_as_it_is() -> None:
    times = StepTimes(Measured(FULL, {1: 0.5}))
    for _ in range(240):
        times.note_full(4, 4, 0, 0, 6.0)
    for sequences, more in ((1, 0), (1, 5), (4, 8)):
        assert times.full(sequences, more)[more] == pytest.approx(
            3 * StepTimes(Measured(FULL, {1: 0.5})).full(sequences, more)[more], rel=0.01
        )
