"""Which virtual shards each expert seat serves and holds, now and once what is asked for has been loaded.

The *primary* layout is what epochs have where everybody is there. A *goal* is another one, of so many seats as were
asked for: it becomes the primary layout as soon as each of its seats holds what it is to serve, and delays nothing
before. Whoever is missing, any layout will do that those present can serve by what they hold. Plain data, no clock.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from divisi.cluster.gang.membership.layout.balance import most_leaves
from divisi.model.placement import Layout

NOTHING: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Held:
    """What the process in a seat holds, and on which machine."""

    leaves: frozenset[int]
    host: str = ""


Holdings = Mapping[int, Held]
"""By the index of the seat."""


class Layouts:
    """Of one gang whose experts are on ranks of their own."""

    def __init__(self, leaves: int, seats: int, copies: int = 0, uneven: bool = False) -> None:
        """`leaves`: of the tree; `copies`: by how many other seats each is to be held; `uneven`: whether seats may be
        given more than their share, for the sake of balance."""
        self._leaves, self._copies, self._uneven = leaves, copies, uneven
        self.primary = Layout.even(leaves, seats)
        self.goal: Layout | None = None
        self.last_change: Literal["scaled", "moved", ""] = ""
        """What the last epoch has brought: the goal, of another number of seats or not, or neither."""
        self._extra: dict[int, frozenset[int]] = {}
        """Copies, by seat."""

    @property
    def seats(self) -> int:
        """How many there are, with those that the goal needs and those that it leaves out."""
        return max(len(self.primary.served), 0 if self.goal is None else len(self.goal.served))

    @property
    def wanted_seats(self) -> int:
        """How many there are to be."""
        return len((self.goal or self.primary).served)

    def scale(self, seats: int, holdings: Holdings) -> None:
        """Have so many seats, from when each holds its share. Raises ValueError where some would have nothing."""
        if not 1 <= seats <= self._leaves:
            raise ValueError(
                f"expert_shards={seats}: the experts are cut into {self._leaves} virtual shards; give 1 to "
                f"{self._leaves}, or raise gang.virtual_shards (at most one for each expert) and deploy anew"
            )
        if self.goal is None or len(self.goal.served) != seats:
            served = {seat: Held(frozenset(own)) for seat, own in enumerate(self.primary.served)}
            self.goal = None if seats == len(self.primary.served) else nearest(self._leaves, seats, served, holdings)

    def aim(self, layout: Layout) -> None:
        """Have this one of as many seats, from when each of them holds what it is to serve."""
        self.goal = layout

    def give_up(self) -> None:
        """Have no goal any more: what was loaded for its sake is dropped."""
        self.goal = None

    def settle(self, former: Layout | None, holdings: Holdings) -> None:
        """Go on from what a gang has that another coordinator has known: the layout of its last epoch, if anybody was
        in it, and what its shards hold."""
        wanted = self.wanted_seats
        if former is not None and (_is_even(former) or (self._uneven and _is_fair(former))):
            self.primary = former
        else:
            seats = len(self.primary.served) if former is None else len(former.served)
            self.primary = nearest(self._leaves, seats, holdings)
        self.goal, self._extra = None, spread(self.primary, self._copies, holdings)
        self.scale(wanted, holdings)

    def choose(self, holdings: Holdings) -> Layout | None:
        """What those seats would serve in an epoch: the goal, else the primary layout, else whatever they can; None
        where some leaf is held by none of them."""
        for layout in filter(None, (self.goal, self.primary)):
            if all(set(own) <= _leaves_of(holdings, seat) for seat, own in enumerate(layout.served)):
                return layout
        return self._cover(holdings)

    def begin(self, layout: Layout, holdings: Holdings) -> None:
        """An epoch begins with it. What is to be held besides is found out anew: seats may be elsewhere by now."""
        self.last_change = ""
        if layout == self.goal:
            self.last_change = "moved" if len(layout.served) == len(self.primary.served) else "scaled"
            self.primary, self.goal = layout, None
        if layout == self.primary:
            self._extra = spread(layout, self._copies, holdings)

    def is_better(self, layout: Layout, current: Layout) -> bool:
        """Whether an epoch with the one is worth the end of another's that serves as well."""
        if layout == current:
            return False
        return layout in (self.goal, self.primary) or sum(map(bool, layout.served)) > sum(map(bool, current.served))

    def first_share(self, seat: int) -> frozenset[int]:
        """What a process loads before it takes a seat: what epochs wait for."""
        own = _served(self.primary, seat)
        return own or _served(self.goal, seat)

    def wanted(self, seat: int) -> frozenset[int]:
        """What the process in a seat is to hold; copies are loaded once the goal is reached."""
        own = _served(self.primary, seat)
        return own | (self._extra.get(seat, NOTHING) if self.goal is None else _served(self.goal, seat))

    def _cover(self, holdings: Holdings) -> Layout | None:
        served: list[list[int]] = [[] for _ in range(max([len(self.primary.served) - 1, *holdings]) + 1)]
        orphans: dict[int, list[int]] = {}
        for leaf, seat in enumerate(self.primary.server):
            if leaf in _leaves_of(holdings, seat):
                served[seat].append(leaf)
            else:
                orphans[leaf] = [seat for seat in sorted(holdings) if leaf in holdings[seat].leaves]
        for leaf, able in sorted(orphans.items(), key=lambda orphan: len(orphan[1])):
            if not able:
                return None
            min((served[seat] for seat in able), key=len).append(leaf)
        while not served[-1] and len(served) > len(self.primary.served):
            served.pop()
        return Layout(self._leaves, tuple(tuple(sorted(own)) for own in served))


def nearest(leaves: int, seats: int, *holdings: Holdings) -> Layout:
    """The even deal, up to who gets which, for which little has to be loaded: each seat keeps of what it has as much as
    is its share, in the order of `holdings`, and what is left goes to whoever has room."""
    size, extra = divmod(leaves, seats)
    having = [len(_leaves_of(holdings[0], seat)) if holdings else 0 for seat in range(seats)]
    larger = sorted(range(seats), key=lambda seat: (having[seat] <= size, having[seat] > 0))[:extra]
    room = {seat: size + (seat in larger) for seat in range(seats)}
    server: dict[int, int] = {}
    for known in holdings:
        for seat in range(seats):
            for leaf in sorted(_leaves_of(known, seat) - server.keys())[: room[seat]]:
                server[leaf] = seat
                room[seat] -= 1
    for leaf in range(leaves):
        if leaf not in server:
            seat = server[leaf] = next(seat for seat in range(seats) if room[seat])
            room[seat] -= 1
    return Layout(leaves, tuple(tuple(leaf for leaf in range(leaves) if server[leaf] == seat) for seat in range(seats)))


def spread(layout: Layout, copies: int, holdings: Holdings) -> dict[int, frozenset[int]]:
    """Which leaves each seat holds besides its own, so that as many others hold each: on other machines than whoever
    has it already where there are any, where it lies already, and then where there is least."""
    extra: dict[int, set[int]] = {seat: set() for seat in holdings}
    for _ in range(copies):
        for leaf, server in enumerate(layout.server):
            owners = [server, *(seat for seat, own in extra.items() if leaf in own)]
            hosts = {holdings[seat].host for seat in owners if seat in holdings}
            able = [seat for seat in sorted(holdings) if seat not in owners]
            if able:
                best = min(able, key=lambda seat: _cost(holdings[seat], leaf, hosts, len(extra[seat])))
                extra[best].add(leaf)
    return {seat: frozenset(own) for seat, own in extra.items()}


def _is_even(layout: Layout) -> bool:
    sizes = [len(own) for own in layout.served]
    return max(sizes) - min(sizes) <= 1


def _is_fair(layout: Layout) -> bool:
    """Whether it may have been made for the sake of balance; what covers for a missing seat leaves that one out."""
    sizes = [len(own) for own in layout.served]
    return min(sizes) > 0 and max(sizes) <= most_leaves(layout.leaves, len(sizes))


def _cost(held: Held, leaf: int, hosts: set[str], load: int) -> tuple[bool, bool, int]:
    return held.host in hosts, leaf not in held.leaves, load


def _leaves_of(holdings: Holdings, seat: int) -> frozenset[int]:
    return holdings[seat].leaves if seat in holdings else NOTHING


def _served(layout: Layout | None, seat: int) -> frozenset[int]:
    return NOTHING if layout is None or seat >= len(layout.served) else frozenset(layout.served[seat])
