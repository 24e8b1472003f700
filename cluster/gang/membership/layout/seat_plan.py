"""Which seats a gang has and what their holders are to have: as many expert seats as there were at first, or as were
asked for since, each with its virtual shards. Plain data, no clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Literal

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.layout.layouts import Layouts
from divisi.cluster.gang.membership.layout.rebalancing import Moves, Settled
from divisi.cluster.gang.membership.layout.selection import Selection, held_by, is_to_change, select
from divisi.cluster.gang.membership.vacancies import Applicant, Share, Vacancies
from divisi.cluster.seats import GangShape, Membership
from divisi.model.placement import Layout

Holders = Collection[Holder]


class SeatPlan:
    """The seats of one gang; holders are handed in."""

    def __init__(
        self, shape: GangShape, virtual_shards: int, copies: int, now: float, rebalance: bool = False
    ) -> None:
        """`shape`: as it is at first; `copies`: how many seats hold each virtual shard besides the one that serves
        it."""
        apart = shape.expert_shards and not shape.colocated
        self._first = shape
        self._layouts = Layouts(virtual_shards, shape.expert_shards, copies, rebalance) if apart else None
        self.vacancies = Vacancies(range(len(shape.shard_ranks)), now)

    @property
    def shape(self) -> GangShape:
        """All seats, with those that are to come and those that are to go."""
        return self._shape_with(None if self._layouts is None else self._layouts.seats)

    @property
    def served_shape(self) -> GangShape:
        """The seats that an epoch fills where everybody is there."""
        return self._shape_with(None if self._layouts is None else len(self._layouts.primary.served))

    @property
    def wanted_shards(self) -> int:
        """How many expert shards there are to be."""
        return self._first.expert_shards if self._layouts is None else self._layouts.wanted_seats

    def scale(self, expert_shards: int, holders: Holders, now: float) -> None:
        """Have so many expert shards, from when they have loaded what they are to serve. Raises ValueError."""
        if self._layouts is None:
            kind = "each attention worker holds" if self._first.colocated else "its one process holds"
            raise ValueError(f"expert_shards={expert_shards}: {kind} the experts; use gang.topology 'split'")
        self._layouts.scale(expert_shards, held_by(holders))
        self.vacancies.resize(self._layouts.seats, now)

    @property
    def moves(self) -> Moves | None:
        """What virtual shards are moved by; None where no seat has experts alone."""
        return self._layouts

    @property
    def last_change(self) -> Literal["scaled", "moved", ""]:
        """What of the layout the last epoch has changed for good."""
        return "" if self._layouts is None else self._layouts.last_change

    def settled(self, serves: Membership, holders: Holders) -> Settled | None:
        """What there is to move, by whom; None while anything else is under way."""
        shards = [holder for holder in holders if holder.seat.role == "expert"]
        layouts = self._layouts
        if layouts is None or layouts.goal is not None or serves.layout != layouts.primary:
            return None
        if any(holder.held != holder.told or self.order(holder, serves) is not None for holder in shards):
            return None
        members = [holder for holder in shards if holder.holder_id in serves.holders]
        held = {holder.seat.index: holder.held for holder in members}
        return Settled(frozenset(holder.holder_id for holder in members), held)

    def lacking(self, holders: Holders) -> list[str] | None:
        """What the goal waits for, for people; None where there is none."""
        goal = None if self._layouts is None else self._layouts.goal
        if goal is None:
            return None
        held = held_by(holders)
        found = []
        for seat, own in enumerate(goal.served):
            if seat not in held:
                found.append(f"expert:{seat} is not there yet")
            elif missing := len(set(own) - held[seat].leaves):
                found.append(f"expert:{seat} is to load {missing} of {len(own)} virtual shards")
        return found

    def settle(self, former: Layout | None, holders: Holders, now: float) -> None:
        """Go on from what a former gang's shards hold, and from the layout that it had last, if that is known."""
        if self._layouts is not None:
            self._layouts.settle(former, held_by(holders))
            self.vacancies.resize(self._layouts.seats, now)

    def begin(self, layout: Layout | None, members: Holders, now: float) -> None:
        """An epoch with that layout begins."""
        if self._layouts is not None and layout is not None:
            self._layouts.begin(layout, held_by(members))
            self.vacancies.resize(self._layouts.seats, now)

    def surplus(self, holders: Holders) -> list[Holder]:
        """Holders of seats that there are no more."""
        seats = self.shape.seats
        return [holder for holder in holders if holder.seat not in seats]

    def select(self, holders: Holders, least_workers: int, now: float) -> Selection | None:
        """See `selection`."""
        return select(holders, self._first, self._layouts, least_workers, now)

    def is_to_change(self, current: Membership, holders: Holders, now: float) -> bool:
        """See `selection`."""
        return is_to_change(current, holders, self._layouts, now)

    def suffice(self, holders: Holders, least_workers: int) -> bool:
        """Whether these are enough for an epoch, once they can be in it."""
        workers = sum(holder.seat.role == "attention" for holder in holders)
        if self._layouts is not None and self._layouts.choose(held_by(holders)) is None:
            return False
        return workers >= (self._first.size if self._first.colocated else least_workers)

    def note_held(self, holder: Holder, leaves: frozenset[int] | None) -> None:
        """A shard comes and has these; None: what it was to load."""
        if self._layouts is not None and holder.seat.role == "expert":
            holder.has(self._layouts.first_share(holder.seat.index) if leaves is None else leaves)

    def order(self, holder: Holder, serves: Membership | None) -> frozenset[int] | None:
        """What a holder is to have, where it has not been told yet. `serves`: the epoch that serves now.

        Nobody drops anything before everybody serves what is to be served.
        """
        if self._layouts is None or holder.seat.role != "expert":
            return None
        settled = self._layouts.goal is None and serves is not None and serves.layout == self._layouts.primary
        leaves = self._layouts.wanted(holder.seat.index) | (frozenset() if settled else holder.held)
        return None if leaves == holder.told else leaves

    def vacancy(self, applicant: Applicant, holders: Holders, now: float) -> Share | None:
        """The share of the experts that a process is to load, and then to join for; None where nobody is wanted."""
        if self._layouts is None:
            return None
        held = {holder.seat.index: holder.address.process for holder in holders if holder.seat.role == "expert"}
        index = self.vacancies.find(applicant, held, now)
        return None if index is None else Share(index, self._layouts.first_share(index))

    def _shape_with(self, expert_shards: int | None) -> GangShape:
        return self._first if expert_shards is None else replace(self._first, expert_shards=expert_shards)
