"""The seats of a gang, their ranks, and who takes part in an epoch."""

from __future__ import annotations

import pytest

from divisi.cluster.seats import Address, GangShape, Membership, Seat
from divisi.model.placement import Layout


def test_ranks_number_workers_first() -> None:
    shape = GangShape(2, 3)
    assert [str(seat) for seat in shape.seats] == ["attention:0", "attention:1", "expert:0", "expert:1", "expert:2"]
    assert [shape.rank(seat) for seat in shape.seats] == list(range(5))
    assert list(shape.shard_ranks) == [2, 3, 4]


def test_colocated_ranks_hold_the_shards() -> None:
    shape = GangShape(3, 3, colocated=True)
    assert [str(seat) for seat in shape.seats] == ["attention:0", "attention:1", "attention:2"]
    assert (shape.size, list(shape.shard_ranks)) == (3, [])
    with pytest.raises(ValueError, match="as many expert shards"):
        GangShape(3, 2, colocated=True)


def membership(absent: frozenset[Seat], layout: Layout) -> Membership:
    shape = GangShape(1, 3)
    present = tuple(str(seat) for seat in shape.seats if seat not in absent)
    return Membership(1, shape, present, (Address("h"),) * len(present), Address("s"), absent, layout=layout)


def test_an_expert_seat_that_serves_nothing_has_no_rank() -> None:
    two = membership(frozenset({Seat("expert", 1)}), Layout(4, ((0, 3), (), (1, 2))))
    assert two.shards == {0: 1, 2: 2}
    assert two.size == 3


@pytest.mark.parametrize("absent", [[], [0], [1, 2]], ids=str)
def test_who_takes_part_and_who_serves_experts_are_the_same(absent: list[int]) -> None:
    with pytest.raises(ValueError, match="take part"):
        membership(frozenset(Seat("expert", index) for index in absent), Layout(4, ((0, 3), (), (1, 2))))
