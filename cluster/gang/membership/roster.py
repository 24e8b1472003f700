"""Who holds which seat, and when a new epoch begins: the coordinator's logic as plain data.

No clock, threads or sockets: every method takes `now` in seconds. An epoch forms of those who are there and have their
weights, once they are enough (every expert, and the least number of attention workers; a colocated gang waits for all)
and everybody has left the previous epoch. Who is to have died or hung, by a peer's word, is not waited for: the new
epoch fences it, and one that turns out to live comes back with the next. An epoch ends between two steps, by its
leader, when somebody comes or wants to go; and at once when a holder reports that a step could not finish, leaves its
seat or stops renewing its lease. Late and repeated reports are ignored. Who was told another spec than the coordinator
gets no seat. A roster that follows on another's gathers first who is in an epoch that goes on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.explanation import whom_it_waits_for
from divisi.cluster.gang.membership.gathering import Gathering
from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.layout.rebalancing import Settled
from divisi.cluster.gang.membership.layout.seat_plan import SeatPlan
from divisi.cluster.gang.membership.layout.selection import note_misses
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.seats import Address, GangShape, Membership, Patience, Role, Seat
from divisi.model.placement import VIRTUAL_SHARDS


class Roster:
    """Seats, their holders, and the current epoch."""

    def __init__(
        self,
        shape: GangShape,
        store: Address,
        lease_s: float,
        grace_s: float,
        first_epoch: int = 1,
        min_attention_workers: int | None = None,
        spec: str = "",
        gather_until: float | None = None,
        patience: Patience | None = None,
        now: float = 0.0,
        virtual_shards: int = VIRTUAL_SHARDS,
        copies: int = 0,
        rebalance: bool = False,
    ) -> None:
        """`min_attention_workers`: with how many an epoch forms; None: all. `spec`: the fingerprint of the gang's.

        `gather_until`: when to begin anew, unless an epoch of a former roster's is whole before; None: there was none.
        `shape` has as many expert shards as there are at first, `copies` of each virtual shard are held beside it.
        `rebalance`: whether virtual shards may be moved, so that some seats have more than others.
        """
        self.plan = SeatPlan(shape, virtual_shards, copies, now, rebalance)
        self.spec = spec
        self.min_attention_workers = min_attention_workers or shape.attention_workers
        self.membership: Membership | None = None
        """The current epoch's; None between epochs."""
        self.last_break = ""
        self._store = store
        self._patience = patience or Patience()
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._holders: dict[str, Holder] = {}
        self._epoch = self._order = first_epoch - 1
        self._told_to_change = 0
        """The epoch whose leader was told."""
        self.in_order = False
        """The last epoch has ended in good order, and the next one is about to serve."""
        self._strangers: set[Role] = set()
        """Who was told another spec, and asked for a seat."""
        needed = replace(shape, expert_shards=0) if copies else shape
        self._gathering = None if gather_until is None else Gathering(needed, gather_until)
        self._kept_until = gather_until or 0.0
        """Who held a worker's seat may come back for it until then."""
        self._now = now
        """The last time that this was told."""

    @property
    def shape(self) -> GangShape:
        """All seats, with those that are to come and those that are to go."""
        return self.plan.shape

    def scale(self, expert_shards: int, now: float) -> None:
        """Have so many expert shards, from when they have loaded what they are to serve. Raises ValueError."""
        self.plan.scale(expert_shards, self._holders.values(), now)
        if self._gathering is not None:
            self._gathering.need(expert_shards)
        self._remove_surplus(now)
        self._form()

    def join(
        self,
        holder_id: str,
        role: Role,
        address: Address,
        now: float,
        index: int | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> Seat | None:
        """Take a seat: the one with `index`, or the lowest free one of the role. Joining twice gives the same seat.

        Returns None when it is held. A shard takes it nevertheless, since it is its former process started anew.
        Returns None, too, for one of another `spec`, which shares no epoch with the others; and for a worker that wants
        any seat, while those who have one may still come back.
        No epoch begins while a holder that joined as `loading` has not `loaded`. `held`: the virtual shards that a
        shard holds; None: what it was to load.
        """
        if (known := self._holders.get(holder_id)) is not None:
            known.hear(now, self._lease_s)
            return known.seat
        if spec != self.spec:
            self._strangers.add(role)
            return None
        taken = {holder.seat: holder for holder in self._holders.values()}
        if index is not None:
            seat = Seat(role, index)
            if seat not in self.shape.seats:
                raise ValueError(f"no seat {seat} in a gang of {self.shape}")
            if seat in taken and role == "attention":
                return None
            if seat in taken:
                self._remove(taken[seat], f"{seat} was taken over by a new process", now)
        elif now < self._kept_until:
            return None
        else:
            free = [seat for seat in self.shape.seats if seat.role == role and seat not in taken]
            if not free:
                return None
            seat = free[0]
        holder = Holder(holder_id, seat, address, now, now + self._lease_s, loading)
        self._holders[holder_id] = holder
        self.plan.note_held(holder, held)
        self._form()
        return seat

    def resume(
        self,
        holder_id: str,
        seat: Seat,
        address: Address,
        now: float,
        membership: Membership | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> bool:
        """Go on in a seat that this roster has given, or a former one.

        `membership` is that of the epoch which the holder is in: what it has reported in vain meanwhile is made up for.
        False when the seat is another's, or for another spec.
        """
        inside = 0 if membership is None else membership.epoch
        self._epoch = max(self._epoch, inside)
        if (known := self._holders.get(holder_id)) is not None:
            known.hear(now, self._lease_s)
            if known.epoch not in (0, inside):
                self.left(holder_id, known.epoch, "its report was lost", now)
            known.epoch, known.told_to_leave, known.loading = inside, False, loading
            self.plan.note_held(known, held)
            self._form()
            return True
        if spec != self.spec or not self._may_have(seat) or any(seat == h.seat for h in self._holders.values()):
            return False
        holder = Holder(holder_id, seat, address, now, now + self._lease_s, loading, inside)
        self._holders[holder_id] = holder
        self.plan.note_held(holder, held)
        if membership is not None and self._gathering is not None:
            self._gathering.claim(membership)
        self._form()
        return True

    def waits(self, applicant: Applicant, until: float) -> None:
        """A process that could serve experts has asked whether it is wanted, and asks again after `until`."""
        self.plan.vacancies.waits(applicant, until)

    def vacancy(self, applicant: Applicant, now: float) -> Share | None:
        """The share of the experts that a process is to load, and then to join for; None where nobody is wanted."""
        if self._gathering is not None:  # an epoch may go on, with who is not there yet
            return None
        return self.plan.vacancy(applicant, self._holders.values(), now)

    def prepared(self, holder_id: str, order: int) -> None:
        """A shard has what it was told to have by that order."""
        if (holder := self._holders.get(holder_id)) is not None:
            holder.prepared(order)
            self._form()

    def ended(self, holder_id: str, now: float) -> None:
        """A holder's process has ended, as one of its machine has seen; no need to wait for its lease."""
        self._now = now
        if (holder := self._holders.get(holder_id)) is not None:
            self._remove(holder, f"{holder.seat} has died", now)
            self._form()

    @property
    def gathering(self) -> bool:
        """Whether a former roster's epoch may still be found whole."""
        return self._gathering is not None

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

    def retire(self, holder_id: str) -> bool:
        """A holder wants to go, once the step under way has ended; no epoch has it then. Whether one has it yet."""
        if (holder := self._holders.get(holder_id)) is None:
            return False
        holder.retiring = True
        return bool(holder.epoch) or (self.membership is not None and holder_id in self.membership.holders)

    def beat(self, holder_id: str, now: float) -> None:
        """Renew a lease; an unknown holder is told to rejoin by its next directive."""
        if (holder := self._holders.get(holder_id)) is not None:
            holder.hear(now, self._lease_s)

    def expire(self, now: float) -> None:
        """Take the seats of holders whose lease has lapsed; a former roster's are waited for as long as agreed."""
        self._now = now
        if self._gathering is not None and now >= self._gathering.until:
            self._settle(self._gathering)
        for holder in [h for h in self._holders.values() if h.lease_until <= now]:
            self._remove(holder, f"{holder.seat} was not heard of for too long", now)
        self._form()

    def directive(self, holder_id: str) -> Directive:
        """What a holder shall do now; `enter` and `leave` are given once."""
        holder = self._holders.get(holder_id)
        if holder is None:
            return Directive("rejoin")
        if self._gathering is not None:
            return Directive("stay")
        current = self.membership
        if holder.epoch and (current is None or holder.epoch != current.epoch):
            if holder.told_to_leave:
                return Directive("stay")
            holder.told_to_leave = True
            return Directive("leave", epoch=holder.epoch)
        if current is not None and not holder.epoch and holder_id in current.holders:
            holder.epoch, holder.told_to_leave, holder.serving = current.epoch, False, False
            return Directive("enter", membership=current, epoch=current.epoch)
        if current is not None and holder_id == current.holders[0] and self._is_to_change(current):
            self._told_to_change = current.epoch
            return Directive("change", epoch=current.epoch)
        if (leaves := self.plan.order(holder, current if self.serves() else None)) is not None:
            self._order += 1
            holder.tell(leaves, self._order)
            return Directive("prepare", leaves=leaves, order=self._order)
        return Directive("stay")

    def serving(self, holder_id: str, epoch: int) -> None:
        """A holder has reached all its peers of an epoch."""
        holder = self._holders.get(holder_id)
        if holder is not None and holder.epoch == epoch:
            holder.serving = True
            self.in_order = self.in_order and not self.serves()

    def left(self, holder_id: str, epoch: int, reason: str, now: float, suspect: str | None = None) -> None:
        """A holder is out of an epoch and touches nothing of it any more. Ends the epoch if it still ran.

        `suspect` names the seats for whose sake it could not go on.
        """
        self._now = now
        holder = self._holders.get(holder_id)
        if holder is None or holder.epoch != epoch:
            return
        if self.membership is not None and self.membership.epoch == epoch and self._told_to_change != epoch:
            note_misses(self._holders.values(), now)
        holder.epoch, holder.told_to_leave, holder.serving, holder.suspected = 0, False, False, False
        if self.membership is not None and self.membership.epoch == epoch:
            self._break(f"{holder.seat}: {reason}", now)
            self.in_order = suspect is None and self._told_to_change == epoch
        suspects = () if suspect is None else suspect.split(", ")
        for other in self._holders.values():
            if str(other.seat) in suspects and other.epoch == epoch:
                other.suspect(now)
        self._form()

    def ready(self) -> bool:
        """Whether every rank of the current epoch has reached its peers, or will have in a moment."""
        return self.in_order or self.serves()

    @property
    def settled(self) -> Settled | None:
        """What there is to move, where the epoch serves and nothing else is under way."""
        current = self.membership
        return None if current is None or not self.serves() else self.plan.settled(current, self._holders.values())

    def serves(self) -> bool:
        """Whether every rank of the current epoch has reached its peers."""
        current = self.membership
        return current is not None and all(self._holders[holder_id].serving for holder_id in current.holders)

    def explain(self) -> str:
        """Why the gang isn't ready, for people; names the seats that are missing."""
        if self.in_order:
            return f"epoch {self._epoch} makes room for others"
        if self.serves():
            absent = ", ".join(sorted(map(str, self.membership.absent))) if self.membership else ""
            return f"epoch {self._epoch} serves" + (f", without {absent}" if absent else "")
        if self._gathering is not None:
            return "the coordinator was started anew and looks who is there"
        after = f" (epoch {self._epoch} ended: {self.last_break})" if self.last_break else ""
        if self._strangers:
            after += f"; refused for another spec: {', '.join(sorted(self._strangers))}"
        holders = self._holders.values()
        enough = self.plan.suffice(holders, self.min_attention_workers)
        return whom_it_waits_for(self.plan.served_shape, holders, enough, self.membership, self._epoch) + after

    def holders(self) -> Iterator[Holder]:
        """All holders, in no particular order."""
        return iter(self._holders.values())

    def _remove(self, holder: Holder, reason: str, now: float) -> None:
        del self._holders[holder.holder_id]
        if holder.seat.role == "expert":
            self.plan.vacancies.freed(holder.seat.index, holder.address.host, now)
        if self.membership is not None and holder.holder_id in self.membership.holders:
            self._break(reason, now)

    def _break(self, reason: str, now: float) -> None:
        """End the epoch. Its holders must show up soon, so that a dead one doesn't hold up the next for a lease."""
        self.membership = None
        self.last_break = reason
        self.in_order = False
        for holder in self._holders.values():
            holder.serving = False
            holder.lease_until = min(holder.lease_until, now + self._grace_s)

    def _adopt(self, gathering: Gathering) -> None:
        """Go on with an epoch whose members are all back; look no more once there can be none."""
        inside = {holder.holder_id: holder.epoch for holder in self._holders.values()}
        self.membership = gathering.whole(inside)
        held = {holder.seat: holder.holder_id for holder in self._holders.values()}
        if (found := self.membership is not None or len(held) >= self.shape.size) or gathering.hopeless(inside, held):
            self._settle(gathering)
        if found:
            self._kept_until = 0.0

    def _settle(self, gathering: Gathering) -> None:
        """Look for no former epoch any more."""
        self._gathering = None
        self.plan.settle(gathering.last_layout, self._holders.values(), self._now)
        self._remove_surplus(self._now)

    def _is_to_change(self, current: Membership) -> bool:
        """Whether its leader has to be told."""
        told = self._told_to_change == current.epoch
        return not told and self.plan.is_to_change(current, self._holders.values(), self._now)

    def _form(self) -> None:
        if self._gathering is not None:
            self._adopt(self._gathering)
        if self.membership is not None or self._gathering is not None:
            return
        if any(holder.epoch and not holder.suspected for holder in self._holders.values()):
            return
        chosen = self.plan.select(self._holders.values(), self.min_attention_workers, self._now)
        if chosen is None:
            self.in_order = False
            return
        self._epoch += 1
        members = chosen.members
        self.membership = Membership(
            self._epoch,
            chosen.shape,
            holders=tuple(holder.holder_id for holder in members.values()),
            addresses=tuple(holder.address for holder in members.values()),
            store=self._store,
            absent=frozenset(seat for seat in chosen.shape.seats if seat not in members),
            patience=self._patience,
            layout=chosen.layout,
        )
        self.plan.begin(chosen.layout, members.values(), self._now)
        self._remove_surplus(self._now)

    def _remove_surplus(self, now: float) -> None:
        """Who has a seat that there is no more is no holder any more, once no epoch needs it."""
        members = () if self.membership is None else self.membership.holders
        for holder in self.plan.surplus(self._holders.values()) if self._gathering is None else ():
            if holder.holder_id not in members:
                self._remove(holder, f"there is no {holder.seat} any more", now)

    def _may_have(self, seat: Seat) -> bool:
        """Whether there is such a seat; of experts' there may turn out to be more while a former gang is looked for."""
        return seat in self.shape.seats or (self._gathering is not None and seat.role == "expert")
