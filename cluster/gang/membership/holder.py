"""A process in a seat, as the roster knows it. Plain data, no clock. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from divisi.cluster.seats import Address, Seat

_SUSPECTS_LEASE_S = 1.5
"""Who is suspected and lives says something within a poll of what it said last."""
_LAST_WORD_S = 0.5
"""For what may be on its way."""


@dataclass(slots=True)
class Holder:
    """A process in a seat."""

    holder_id: str
    seat: Seat
    address: Address
    heard_at: float
    lease_until: float
    loading: bool = False
    """It took the seat to learn which weights to load."""
    epoch: int = 0
    """The epoch that it was sent into and hasn't reported to have left; 0 for none."""
    told_to_leave: bool = False
    serving: bool = False
    """It has reached every peer of its epoch."""
    suspected: bool = False
    """A peer could not go on for its sake; until it says itself that it has left."""
    retiring: bool = False
    """It wants to go, between two steps."""
    misses: int = 0
    """Epochs in a row whose peers it did not reach, though other workers did."""
    out_until: float = 0.0
    """No epoch waits for it before, if it can be without."""
    held: frozenset[int] = frozenset()
    """The virtual shards that it has, and is not about to drop."""
    told: frozenset[int] = frozenset()
    """Those that it was last told to have."""
    order: int = 0
    """By which it was told so; 0: it came with them."""

    @property
    def is_able(self) -> bool:
        """Whether it can be in the next epoch."""
        return not (self.epoch or self.loading or self.retiring)

    def hear(self, now: float, lease_s: float) -> None:
        """It has said something."""
        self.heard_at, self.lease_until = now, now + lease_s

    def has(self, leaves: frozenset[int]) -> None:
        """It comes with these."""
        self.held, self.told, self.order = leaves, leaves, 0

    def tell(self, leaves: frozenset[int], order: int) -> None:
        """It is told to have these, and drops what else it has at once."""
        self.told, self.held, self.order = leaves, self.held & leaves, order

    def prepared(self, order: int) -> None:
        """It has what it was told to have by that order; an older one says nothing of what it has dropped since."""
        if order == self.order:
            self.held = self.told

    def suspect(self, now: float) -> None:
        """A peer could not go on for its sake: it keeps the seat if it says something soon."""
        self.suspected = True
        self.lease_until = min(self.lease_until, max(self.heard_at + _SUSPECTS_LEASE_S, now + _LAST_WORD_S))
