"""The memory of an attention worker's sequences, behind one door: KV pages, state slots, page tables.

Plain Python: numbers only, what lies behind them is the model's. Everything has a count of holders, so that sequences
can share the pages of a prefix, and read a state that belongs to somebody else.

A decoding sequence holds one slot. A scan run never writes the slot that it reads, so a prefilling sequence needs a
second one for the state at the run's end, a *spare*. Both are reserved at admission: a prefill never waits for a slot
half way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from divisi.cluster.engine.memory.pool import Pool

NOTHING = -1
"""Stands for a slot that there is not."""
SLOTS_TO_PREFILL = 2


def pages_for(num_tokens: int, page_size: int) -> int:
    """How many pages hold `num_tokens` tokens."""
    return -(-num_tokens // page_size)


class PageGrowth(NamedTuple):
    """Pages that a sequence got: entries `start` onwards of its page table."""

    table: int
    start: int
    pages: list[int]


class Prefix(NamedTuple):
    """The first `length` tokens of somebody else, to begin with: their pages, and a slot that stands at their end."""

    length: int
    pages: list[int]
    slot: int


@dataclass(slots=True, eq=False)
class Holding:
    """What one admitted sequence holds."""

    table: int
    """Its page table, one of the engine's."""
    pages: list[int]
    spares: list[int]
    """Slots that the coming scan runs leave their states in."""
    slot: int = NOTHING
    """Its own slot; NOTHING before its first state is committed."""
    borrowed: int = NOTHING
    """Somebody else's slot, which its first scan run reads."""

    @property
    def source(self) -> int:
        """The slot that the next run reads."""
        return self.slot if self.borrowed == NOTHING else self.borrowed


class Memory:
    """All pages, slots and page tables of a worker, and who holds them."""

    def __init__(self, *, num_pages: int, page_size: int, num_slots: int, num_tables: int) -> None:
        self.page_size = page_size
        self.pages = Pool("page", num_pages)
        self.slots = Pool("slot", num_slots)
        self.tables = Pool("page table", num_tables)
        self._growths: list[PageGrowth] = []
        self._copies: list[tuple[int, int]] = []

    def can_acquire(self, num_tokens: int, headroom: int) -> bool:
        """Whether a sequence of so many tokens can prefill and `headroom` pages stay free."""
        needed = pages_for(num_tokens, self.page_size) + headroom
        return bool(self.tables.num_free and self.slots.num_free >= SLOTS_TO_PREFILL and needed <= self.pages.num_free)

    def acquire(self, num_tokens: int, prefix: Prefix | None = None) -> Holding:
        """All that the prefill of so many tokens needs; the caller has checked `can_acquire`.

        The whole pages of a prefix are shared. Its last page is copied where it is partly filled, since the sequence
        goes on writing there.
        """
        (table,) = self.tables.take(1)
        shared: list[int] = []
        if prefix is not None:
            shared = prefix.pages[: prefix.length // self.page_size]
            self.pages.share(shared)
            self.slots.share([prefix.slot])
        own = self.pages.take(pages_for(num_tokens, self.page_size) - len(shared))
        holding = Holding(table, shared + own, self.slots.take(SLOTS_TO_PREFILL))
        if prefix is not None:
            holding.borrowed = prefix.slot
            if prefix.length % self.page_size:
                self._copies.append((prefix.pages[len(shared)], own[0]))
        self._growths.append(PageGrowth(table, 0, holding.pages.copy()))
        return holding

    def grow(self, holding: Holding) -> bool:
        """Give a sequence one more page; False where none is free."""
        if not self.pages.num_free:
            return False
        page = self.pages.take(1)
        self._growths.append(PageGrowth(holding.table, len(holding.pages), page))
        holding.pages += page
        return True

    def trim(self, holding: Holding, num_tokens: int) -> None:
        """Return the pages past those that hold so many tokens."""
        kept = pages_for(num_tokens, self.page_size)
        self.pages.give_back(holding.pages[kept:])
        del holding.pages[kept:]

    def settle(self, holding: Holding, slot: int) -> None:
        """Make `slot`, one of the spares, the sequence's own.

        The slot that it replaces is a spare from now on. A borrowed one is only held no longer.
        """
        holding.spares.remove(slot)
        if holding.borrowed != NOTHING:
            self.slots.give_back([holding.borrowed])
            holding.borrowed = NOTHING
        elif holding.slot != NOTHING:
            holding.spares.append(holding.slot)
        holding.slot = slot

    def end_prefill(self, holding: Holding) -> None:
        """Return the spares: what follows goes through the ring."""
        self.slots.give_back(holding.spares)
        holding.spares = []

    def release(self, holding: Holding) -> None:
        """Return everything."""
        self.pages.give_back(holding.pages)
        self.slots.give_back(slot for slot in (*holding.spares, holding.slot, holding.borrowed) if slot != NOTHING)
        self.tables.give_back([holding.table])

    def take_growths(self) -> tuple[PageGrowth, ...]:
        """What the page tables got since the last call."""
        growths, self._growths = tuple(self._growths), []
        return growths

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """Pages to copy, (from, to), before the next step."""
        copies, self._copies = tuple(self._copies), []
        return copies
