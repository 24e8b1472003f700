"""Which virtual shards each seat serves and holds: the rules one by one."""

from __future__ import annotations

import pytest

from divisi.cluster.gang.membership.layout.layouts import Held, Layouts, nearest, spread
from divisi.model.placement import Layout


def held(*own: object, hosts: str = "") -> dict[int, Held]:
    """By seat; None: nobody is there."""
    named = hosts or "a" * len(own)
    return {seat: Held(frozenset(leaves), named[seat]) for seat, leaves in enumerate(own) if leaves is not None}  # type: ignore[arg-type]


def test_one_more_shard_loads_its_share_and_nobody_else_anything() -> None:
    layout = nearest(32, 3, held(range(16), range(16, 32)))
    assert [len(own) for own in layout.served] == [11, 11, 10]
    assert set(layout.served[0]) < set(range(16))
    assert set(layout.served[1]) < set(range(16, 32))


def test_one_shard_less_is_shared_out() -> None:
    three = nearest(32, 3, held(range(16), range(16, 32)))
    assert nearest(32, 2, held(*three.served)) == Layout.even(32, 2)


@pytest.mark.parametrize(("leaves", "shards"), [(32, 3), (8, 8), (5, 2), (7, 4)])
def test_who_holds_an_even_share_keeps_it(leaves: int, shards: int) -> None:
    even = Layout.even(leaves, shards)
    assert nearest(leaves, shards, held(*even.served)) == even
    for seat in range(shards):
        alone = {seat: Held(frozenset(even.served[seat]))}
        assert set(nearest(leaves, shards, alone).served[seat]) == set(even.served[seat])


def test_a_goal_counts_once_each_of_its_seats_holds_its_share() -> None:
    layouts, before = Layouts(8, 1), held(range(8))
    layouts.scale(2, before)
    assert layouts.goal is not None
    assert (layouts.seats, layouts.wanted_seats) == (2, 2)
    assert layouts.choose(before) == layouts.primary
    assert layouts.choose(before | {1: Held(frozenset({4, 5, 6}))}) == layouts.primary
    assert (layouts.first_share(0), layouts.first_share(1)) == (frozenset(range(8)), frozenset(range(4, 8)))
    chosen = layouts.choose(before | {1: Held(frozenset(range(4, 8)))})
    assert chosen == layouts.goal
    layouts.begin(chosen, before)
    assert (layouts.primary, layouts.goal) == (chosen, None)
    assert layouts.wanted(0) == frozenset(range(4))


def test_a_goal_is_taken_back() -> None:
    layouts = Layouts(8, 2)
    layouts.scale(3, {})
    layouts.scale(2, {})
    assert (layouts.goal, layouts.seats) == (None, 2)


@pytest.mark.parametrize("seats", [0, 9])
def test_how_many_there_can_be(seats: int) -> None:
    with pytest.raises(ValueError, match=f"expert_shards={seats}: .* give 1 to 8"):
        Layouts(8, 2).scale(seats, {})


def test_whoever_holds_it_serves_what_a_missing_seat_would() -> None:
    layouts = Layouts(8, 3)  # 0-2, 3-5, 6-7
    chosen = layouts.choose(held(range(8), None, {3, 4, 6, 7}))
    assert chosen == Layout(8, ((0, 1, 2, 5), (), (3, 4, 6, 7)))
    assert layouts.choose(held(range(3), None, {3, 4, 6, 7})) is None, "nobody has the sixth"
    assert layouts.is_better(layouts.primary, chosen)
    assert not layouts.is_better(chosen, layouts.primary)


def test_copies_are_on_other_machines_where_there_are_any() -> None:
    layout = Layout.even(8, 4)
    extra = spread(layout, 1, held(*layout.served, hosts="aabb"))
    for seat, server in ((0, "a"), (1, "a"), (2, "b"), (3, "b")):
        for leaf in extra[seat]:
            assert "aabb"[layout.server[leaf]] != server
    assert [len(extra[seat]) for seat in range(4)] == [2, 2, 2, 2]
    assert spread(layout, 1, held(*layout.served))[0], "one machine is better than none"


def test_copies_lie_where_they_are() -> None:
    layout = Layout.even(8, 4)
    extra = spread(layout, 2, held(*layout.served))
    again = spread(layout, 2, held(*(set(own) | extra[seat] for seat, own in enumerate(layout.served))))
    assert again == extra
    for leaf in range(8):
        assert sum(leaf in own for own in extra.values()) == 2
    assert spread(Layout.even(8, 1), 2, held(range(8))) == {0: frozenset()}


def test_copies_are_loaded_once_the_goal_is_reached() -> None:
    layouts, everything = Layouts(8, 2, copies=1), frozenset(range(8))
    layouts.begin(layouts.primary, held(range(4), range(4, 8)))
    assert layouts.wanted(0) == layouts.wanted(1) == everything
    layouts.scale(4, held(everything, everything))
    assert layouts.goal is not None
    assert layouts.wanted(0) == frozenset(range(4)) | frozenset(layouts.goal.served[0])


def test_a_former_gangs_layout_goes_on() -> None:
    layouts, three = Layouts(32, 2), nearest(32, 3, held(range(16), range(16, 32)))
    layouts.scale(3, {})
    layouts.settle(three, held(*three.served))
    assert (layouts.primary, layouts.goal) == (three, None)


def test_of_a_former_gang_that_had_lost_a_shard_each_keeps_its_share() -> None:
    layouts = Layouts(8, 2)
    layouts.settle(Layout(8, (tuple(range(8)), ())), held(range(8)))
    assert layouts.primary == Layout.even(8, 2)
