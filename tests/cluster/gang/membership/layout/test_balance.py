"""The best step, by a given load: the rules one by one."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.gang.membership.layout.balance import LEAST_GAIN, better, most_leaves, shares
from divisi.cluster.gang.membership.layout.layouts import Layouts
from divisi.cluster.gang.membership.layout.leaf_loads import ROWS_PER_LEAF, WINDOW_S, LeafLoads
from divisi.model.placement import Layout

EVEN = Layout.even(8, 2)


def test_a_virtual_shard_goes_from_the_busiest_seat_to_the_idlest() -> None:
    layout = Layout.even(9, 3)
    after = better(layout, [4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5], {})
    assert after == Layout(9, ((0, 1), (2, 3, 4, 5), (6, 7, 8)))


def test_where_a_seat_has_as_many_as_it_may_two_are_swapped() -> None:
    assert most_leaves(8, 2) == 6
    layout = Layout(8, ((0, 1), (2, 3, 4, 5, 6, 7)))
    after = better(layout, [8.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], {})
    assert after is not None
    assert [len(own) for own in after.served] == [2, 6]
    assert after.server[1] == 1
    assert after.server[0] == 0


def test_no_seat_is_left_with_nothing() -> None:
    assert better(Layout(4, ((0,), (1, 2, 3))), [9.0, 1.0, 1.0, 1.0], {}) is None


def test_of_steps_that_help_as_much_one_that_loads_nothing_is_taken() -> None:
    load = [2.0] * 4 + [1.0] * 4
    loads_one, copied = better(EVEN, load, {}), better(EVEN, load, {0: range(4), 1: {2, 4, 5, 6, 7}})
    assert loads_one is not None
    assert loads_one.server[2] == 0
    assert copied == Layout(8, ((0, 1, 3), (2, 4, 5, 6, 7)))


def test_of_steps_that_help_as_much_one_with_few_subtrees_is_taken() -> None:
    layout = Layout(8, ((0, 1, 2, 3, 4), (5, 6, 7)))
    after = better(layout, [1.0] * 8, {})
    assert after == EVEN, "in two pieces, and not in five"


def test_what_helps_little_is_left_alone() -> None:
    assert better(EVEN, [1.0] * 8, {}) is None
    assert better(EVEN, [0.0] * 8, {}) is None


@pytest.mark.parametrize("seed", range(20))
def test_every_step_relieves_the_busiest_seat_and_burdens_nobody_as_much(seed: int) -> None:
    rng = random.Random(seed)
    seats = rng.randint(2, 8)
    layout, load = Layout.even(32, seats), [rng.expovariate(1.0) for _ in range(32)]
    for _ in range(20):
        before = shares(layout, load)
        if (after := better(layout, load, {})) is None:
            break
        now, giver = shares(after, load), before.index(max(before))
        assert now[giver] <= before[giver] - LEAST_GAIN + 1e-9
        assert max(now[i] for i in range(seats) if now[i] > before[i]) <= before[giver] - LEAST_GAIN + 1e-9
        layout = after


def test_each_shards_rows_are_taken_over_its_own_time() -> None:
    loads, rows = LeafLoads(2), 4.0 * ROWS_PER_LEAF
    loads.report("a", {"0": 70.0}, 0.0)
    loads.report("b", {"1": 5.0}, 1.0)
    loads.report("a", {"0": 70.0 + rows}, WINDOW_S)
    assert loads.window({"a", "b"}) is None, "the other has said too little"
    loads.report("b", {"1": 5.0 + 2 * rows}, 1.0 + 2 * WINDOW_S)
    assert loads.window({"a", "b"}) == pytest.approx([rows / WINDOW_S] * 2)
    assert loads.window({"a", "b"}) is None, "the next window has begun"


def test_few_rows_make_no_window() -> None:
    loads = LeafLoads(2)
    loads.report("a", {}, 0.0)
    loads.report("a", {"0": 2.0 * ROWS_PER_LEAF - 1}, 100 * WINDOW_S)
    assert loads.window({"a"}) is None
    loads.report("a", {"0": 2.0 * ROWS_PER_LEAF}, 100 * WINDOW_S)
    assert loads.window({"a"}) is not None


def test_a_former_gangs_moves_are_kept_where_there_are_any() -> None:
    moved = Layout(8, ((0, 1), (2, 3, 4, 5, 6, 7)))
    kept, even = Layouts(8, 2, uneven=True), Layouts(8, 2)
    for layouts in (kept, even):
        layouts.settle(moved, {})
    assert (kept.primary, even.primary) == (moved, EVEN)
    kept.settle(Layout(8, (tuple(range(8)), ())), {})
    assert kept.primary == EVEN, "what covers for a missing seat is no move"
