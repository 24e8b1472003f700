from __future__ import annotations

import pytest

from divisi.cluster.engine.pages import PagePool, pages_for


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (262_144, 16_384)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


def test_hands_out_each_page_once_and_takes_it_back() -> None:
    pool = PagePool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    pool.give_back(second)
    assert (pool.num_free, pool.num_used) == (3, 2)
    assert sorted(pool.take(3)) == sorted(second)


def test_taking_nothing_takes_nothing() -> None:
    pool = PagePool(2)
    assert pool.take(0) == []
    assert pool.num_free == 2


def test_misuse_is_caught() -> None:
    pool = PagePool(2)
    page = pool.take(1)
    pool.give_back(page)
    with pytest.raises(AssertionError, match="not in use"):
        pool.give_back(page)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pool.take(3)
