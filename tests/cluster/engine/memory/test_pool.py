from __future__ import annotations

import pytest

from divisi.cluster.engine.memory.pool import Pool


def test_hands_out_each_number_once_and_takes_it_back() -> None:
    pool = Pool("page", 5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    pool.give_back(second)
    assert (pool.num_free, pool.num_used) == (3, 2)
    assert sorted(pool.take(3)) == sorted(second)


def test_taking_nothing_takes_nothing() -> None:
    pool = Pool("page", 2)
    assert pool.take(0) == []
    assert pool.num_free == 2


def test_what_300_hold_is_free_when_the_last_gives_it_back() -> None:
    pool = Pool("page", 2)
    (number,) = pool.take(1)
    for _ in range(299):
        pool.share([number])
    assert pool.holders(number) == 300
    for _ in range(299):
        pool.give_back([number])
    assert (pool.num_free, pool.num_used) == (1, 1)
    pool.give_back([number])
    assert (pool.num_free, pool.num_used) == (2, 0)


def test_misuse_is_caught() -> None:
    pool = Pool("page", 2)
    page = pool.take(1)
    pool.give_back(page)
    with pytest.raises(AssertionError, match=f"page {page[0]} is free"):
        pool.give_back(page)
    with pytest.raises(AssertionError, match=f"page {page[0]} is free"):
        pool.share(page)
    with pytest.raises(AssertionError, match="3 of kind page wanted, 2 free"):
        pool.take(3)
