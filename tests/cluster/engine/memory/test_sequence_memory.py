from __future__ import annotations

import pytest

from divisi.cluster.engine.memory.sequence_memory import NOTHING, Memory, PageGrowth, Prefix, pages_for

PAGE = 4


def make(num_pages: int = 12, num_slots: int = 6, num_tables: int = 3) -> Memory:
    return Memory(num_pages=num_pages, page_size=PAGE, num_slots=num_slots, num_tables=num_tables)


def free(memory: Memory) -> tuple[int, int, int]:
    return memory.pages.num_free, memory.slots.num_free, memory.tables.num_free


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (262_144, 16_384)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert pages_for(tokens, 16) == pages


@pytest.mark.parametrize("limit", [{"num_pages": 3}, {"num_slots": 1}, {"num_tables": 0}], ids=str)
def test_a_prefill_needs_pages_two_slots_and_a_table(limit: dict[str, int]) -> None:
    assert make().can_acquire(9, headroom=1)
    assert not make(**limit).can_acquire(9, headroom=1)


def test_what_is_acquired_grows_and_is_released_whole() -> None:
    memory = make(num_pages=4)
    holding = memory.acquire(9)
    first = holding.pages.copy()
    assert memory.grow(holding)
    assert not memory.grow(holding), "all four pages are held"
    growths = [PageGrowth(holding.table, 0, first), PageGrowth(holding.table, 3, holding.pages[3:])]
    assert list(memory.take_growths()) == growths
    assert memory.take_growths() == ()
    memory.release(holding)
    assert free(memory) == (4, 6, 3)


def test_the_slot_that_is_replaced_becomes_a_spare() -> None:
    memory = make()
    holding = memory.acquire(9)
    first, second = holding.spares
    assert holding.source == NOTHING
    memory.settle(holding, first)
    assert (holding.source, holding.spares) == (first, [second])
    memory.settle(holding, second)
    assert (holding.source, holding.spares) == (second, [first])
    memory.end_prefill(holding)
    assert (holding.source, holding.spares, memory.slots.num_free) == (second, [], 5)
    memory.release(holding)
    assert free(memory) == (12, 6, 3)


def lender(memory: Memory, length: int) -> Prefix:
    holding = memory.acquire(length)
    memory.settle(holding, holding.spares[0])
    memory.end_prefill(holding)
    memory.take_growths()
    return Prefix(length, holding.pages, holding.slot)


def test_a_prefix_is_shared_until_both_are_gone() -> None:
    memory = make()
    prefix = lender(memory, 8)
    borrower = memory.acquire(11, prefix)
    assert borrower.pages[:2] == prefix.pages
    assert borrower.source == prefix.slot
    assert memory.take_copies() == ()
    assert [memory.pages.holders(page) for page in borrower.pages] == [2, 2, 1]
    assert memory.slots.holders(prefix.slot) == 2
    (first, _) = borrower.spares
    memory.settle(borrower, first)
    assert memory.slots.holders(prefix.slot) == 1, "the borrowed slot is the lender's alone again"
    assert prefix.slot not in borrower.spares
    memory.release(borrower)
    assert [memory.pages.holders(page) for page in prefix.pages] == [1, 1]


@pytest.mark.parametrize("settled", [False, True])
def test_whoever_borrowed_and_goes_leaves_the_lender_all_it_had(settled: bool) -> None:
    memory = make()
    prefix = lender(memory, 8)
    before = free(memory)
    borrower = memory.acquire(11, prefix)
    if settled:
        memory.settle(borrower, borrower.spares[0])
    memory.release(borrower)
    assert free(memory) == before
    assert memory.slots.holders(prefix.slot) == 1


def test_a_page_that_the_prefix_fills_in_part_is_copied() -> None:
    memory = make()
    prefix = lender(memory, 10)
    borrower = memory.acquire(11, prefix)
    assert borrower.pages[:2] == prefix.pages[:2]
    assert borrower.pages[2] != prefix.pages[2]
    assert memory.take_copies() == ((prefix.pages[2], borrower.pages[2]),)
    assert memory.take_copies() == ()
