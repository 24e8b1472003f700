"""Who holds which seat, and when a new epoch begins: the coordinator's logic as plain data.

No clock, threads or sockets: every method takes `now` in seconds. An epoch forms when every seat is held, every holder
has its weights, and every holder of the previous epoch has left it. It ends when a holder reports that a step could not
finish, leaves its seat or stops renewing its lease. Late and repeated reports are ignored. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from divisi.cluster.seats import Address, GangShape, Membership, Role, Seat


@dataclass(frozen=True, slots=True)
class Directive:
    """What a holder shall do next. `membership` comes with `enter`, `epoch` with `leave`."""

    action: Literal["stay", "enter", "leave", "rejoin"]
    membership: Membership | None = None
    epoch: int = 0


@dataclass(slots=True)
class Holder:
    """A process in a seat."""

    holder_id: str
    seat: Seat
    address: Address
    lease_until: float
    loading: bool = False
    """It took the seat to learn which weights to load."""
    epoch: int = 0
    """The epoch that it was sent into and hasn't reported to have left; 0 for none."""
    told_to_leave: bool = False
    serving: bool = False
    """It has reached every peer of its epoch."""


class Roster:
    """Seats, their holders, and the current epoch."""

    def __init__(self, shape: GangShape, store: Address, lease_s: float, grace_s: float, first_epoch: int = 1) -> None:
        self.shape = shape
        self.membership: Membership | None = None
        """The current epoch's; None between epochs."""
        self.last_break = ""
        self._store = store
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._holders: dict[str, Holder] = {}
        self._epoch = first_epoch - 1

    def join(
        self,
        holder_id: str,
        role: Role,
        address: Address,
        now: float,
        index: int | None = None,
        loading: bool = False,
    ) -> Seat | None:
        """Take a seat: the one with `index`, or the lowest free one of the role. Joining twice gives the same seat.

        Returns None when it is held. A shard takes it nevertheless, since it is its former process started anew.
        No epoch begins while a holder that joined as `loading` has not `loaded`.
        """
        if (known := self._holders.get(holder_id)) is not None:
            known.lease_until = now + self._lease_s
            return known.seat
        taken = {holder.seat: holder for holder in self._holders.values()}
        if index is not None:
            seat = Seat(role, index)
            if seat not in self.shape.seats:
                raise ValueError(f"no seat {seat} in a gang of {self.shape}")
            if seat in taken and role == "attention":
                return None
            if seat in taken:
                self._remove(taken[seat], f"{seat} was taken over by a new process", now)
        else:
            free = [seat for seat in self.shape.seats if seat.role == role and seat not in taken]
            if not free:
                return None
            seat = free[0]
        self._holders[holder_id] = Holder(holder_id, seat, address, now + self._lease_s, loading)
        self._form()
        return seat

    def loaded(self, holder_id: str) -> None:
        """A holder has the weights of its seat."""
        if (holder := self._holders.get(holder_id)) is not None:
            holder.loading = False
            self._form()

    def leave(self, holder_id: str, reason: str, now: float) -> None:
        """Give the seat up for good."""
        if (holder := self._holders.get(holder_id)) is not None:
            self._remove(holder, f"{holder.seat} left: {reason}", now)
            self._form()

    def beat(self, holder_id: str, now: float) -> None:
        """Renew a lease; an unknown holder is told to rejoin by its next directive."""
        if (holder := self._holders.get(holder_id)) is not None:
            holder.lease_until = now + self._lease_s

    def expire(self, now: float) -> None:
        """Take the seats of holders whose lease has lapsed."""
        for holder in [h for h in self._holders.values() if h.lease_until <= now]:
            self._remove(holder, f"{holder.seat} was not heard of for too long", now)
        self._form()

    def directive(self, holder_id: str) -> Directive:
        """What a holder shall do now; `enter` and `leave` are given once."""
        holder = self._holders.get(holder_id)
        if holder is None:
            return Directive("rejoin")
        current = self.membership
        if holder.epoch and (current is None or holder.epoch != current.epoch):
            if holder.told_to_leave:
                return Directive("stay")
            holder.told_to_leave = True
            return Directive("leave", epoch=holder.epoch)
        if current is not None and not holder.epoch:
            holder.epoch, holder.told_to_leave, holder.serving = current.epoch, False, False
            return Directive("enter", membership=current, epoch=current.epoch)
        return Directive("stay")

    def serving(self, holder_id: str, epoch: int) -> None:
        """A holder has reached all its peers of an epoch."""
        holder = self._holders.get(holder_id)
        if holder is not None and holder.epoch == epoch:
            holder.serving = True

    def left(self, holder_id: str, epoch: int, reason: str, now: float) -> None:
        """A holder is out of an epoch and touches nothing of it any more. Ends the epoch if it still ran."""
        holder = self._holders.get(holder_id)
        if holder is None or holder.epoch != epoch:
            return
        holder.epoch, holder.told_to_leave, holder.serving = 0, False, False
        if self.membership is not None and self.membership.epoch == epoch:
            self._break(f"{holder.seat}: {reason}", now)
        self._form()

    def ready(self) -> bool:
        """Whether every rank of the current epoch has reached its peers."""
        return self.membership is not None and all(holder.serving for holder in self._holders.values())

    def explain(self) -> str:
        """Why the gang isn't ready, for people; names the seats that are missing."""
        if self.ready():
            return f"epoch {self._epoch} serves"
        held = {holder.seat for holder in self._holders.values()}
        after = f" (epoch {self._epoch} ended: {self.last_break})" if self.last_break else ""
        if missing := [str(seat) for seat in self.shape.seats if seat not in held]:
            return f"{len(held)} of {self.shape.size} seats filled, missing {', '.join(missing)}{after}"
        if loading := sorted(str(holder.seat) for holder in self._holders.values() if holder.loading):
            return f"waiting for {', '.join(loading)} to load{after}"
        if self.membership is None:
            staying = sorted(str(holder.seat) for holder in self._holders.values() if holder.epoch)
            return f"waiting for {', '.join(staying)} to leave epoch {self._epoch}{after}"
        slow = sorted(str(holder.seat) for holder in self._holders.values() if not holder.serving)
        return f"epoch {self._epoch} is forming, waiting for {', '.join(slow)}{after}"

    def holders(self) -> Iterator[Holder]:
        """All holders, in no particular order."""
        return iter(self._holders.values())

    def _remove(self, holder: Holder, reason: str, now: float) -> None:
        del self._holders[holder.holder_id]
        if self.membership is not None:
            self._break(reason, now)

    def _break(self, reason: str, now: float) -> None:
        """End the epoch. Its holders must show up soon, so that a dead one doesn't hold up the next for a lease."""
        self.membership = None
        self.last_break = reason
        for holder in self._holders.values():
            holder.serving = False
            holder.lease_until = min(holder.lease_until, now + self._grace_s)

    def _form(self) -> None:
        by_seat = {holder.seat: holder for holder in self._holders.values()}
        if self.membership is not None or len(by_seat) < self.shape.size:
            return
        if any(holder.epoch or holder.loading for holder in by_seat.values()):
            return
        self._epoch += 1
        ordered = [by_seat[seat] for seat in self.shape.seats]
        self.membership = Membership(
            self._epoch,
            self.shape,
            holders=tuple(holder.holder_id for holder in ordered),
            addresses=tuple(holder.address for holder in ordered),
            store=self._store,
        )
