from __future__ import annotations

import pytest

from divisi.cluster.engine.slots import SlotPool


def test_hands_out_each_slot_once_and_takes_it_back() -> None:
    pool = SlotPool(3)
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2]
    assert pool.num_free == 0
    pool.give_back(taken[1])
    assert pool.take() == taken[1]


def test_a_prefill_needs_a_slot_and_a_spare() -> None:
    pool = SlotPool(2)
    assert pool.can_prefill
    slot = pool.take()
    assert not pool.can_prefill
    pool.give_back(slot)
    assert pool.can_prefill


def test_giving_back_twice_is_caught() -> None:
    pool = SlotPool(2)
    slot = pool.take()
    pool.give_back(slot)
    with pytest.raises(AssertionError, match="not in use"):
        pool.give_back(slot)
