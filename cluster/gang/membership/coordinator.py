"""The coordinator: the roster behind a lock, with blocking polls. One per gang; serves many threads.

Imports no torch: the store through which process groups meet is handed in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from divisi.cluster.gang.drain import Drain
from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.expert_changes import ExpertChanges
from divisi.cluster.gang.membership.figures import Figures
from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.gang.membership.lease import OwnerLease
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.stalls import Stalls
from divisi.cluster.gang.membership.status import CoordinatorStatus, Stats
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.gang.refused_demand import RefusedDemand
from divisi.cluster.seats import (
    Address,
    GangShape,
    LocalProcess,
    Membership,
    Patience,
    Role,
    ScrapeTarget,
    Seat,
)
from divisi.model.placement import VIRTUAL_SHARDS

_LOOK_S = 0.2
"""After so long who waits for a seat looks whether a lease has lapsed, which nobody tells."""


class CoordinatorLost(ConnectionError):
    """The coordinator's process is gone or cannot be reached."""


class Coordinator:
    """Seats, epochs, health and statistics of one gang."""

    def __init__(
        self,
        shape: GangShape,
        store: Address,
        lease_s: float = 10.0,
        grace_s: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
        first_epoch: int = 1,
        min_attention_workers: int | None = None,
        spec: str = "",
        gather_s: float | None = None,
        owner_lease_s: float = 30.0,
        patience: Patience | None = None,
        virtual_shards: int = VIRTUAL_SHARDS,
        copies: int = 0,
        rebalance: bool = False,
        wait_rule: WaitRule | None = None,
    ) -> None:
        """`first_epoch` must be above every epoch of a former coordinator of the gang.

        `gather_s`: how long to look for the gang of a former one, before it is formed anew; None: there was none.
        `owner_lease_s`: how long the gang lasts without an owner. `patience`: of each epoch's ranks with each other.
        `min_attention_workers`, `spec`, `virtual_shards`, `copies` and `rebalance`: see Roster. `wait_rule`: by what
        there are more expert shards or fewer; None: as many as are asked for.
        """
        gather_until = None if gather_s is None else clock() + gather_s
        self._roster = Roster(
            shape, store, lease_s, grace_s, first_epoch, min_attention_workers, spec, gather_until, patience, clock(),
            virtual_shards, copies, rebalance,
        )  # fmt: skip
        self._clock = clock
        self._follows = gather_s is not None
        self._changed = threading.Condition()
        self._drain = Drain(clock)
        self._refused = RefusedDemand(clock)
        self._owner = OwnerLease(owner_lease_s, clock)
        self._figures, self._stalls = Figures(), Stalls()
        self._experts = ExpertChanges(self._roster, self._figures, virtual_shards, rebalance, wait_rule)
        self.own_target: ScrapeTarget | None = None
        """Where this process is scraped."""
        self._unplaced = ""

    def join(
        self,
        holder_id: str,
        role: Role,
        address: Address,
        index: int | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> Seat | None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.expire(self._clock())
            known = {holder.holder_id for holder in self._roster.holders()}
            seat = self._roster.join(holder_id, role, address, self._clock(), index, loading, spec, held)
            if seat is not None and holder_id not in known:
                self._figures.joins[str(seat)] += 1
            self._note_changes()
            self._changed.notify_all()
        return seat

    def resume(
        self,
        holder_id: str,
        seat: Seat,
        address: Address,
        membership: Membership | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> bool:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.expire(self._clock())
            resumed = self._roster.resume(holder_id, seat, address, self._clock(), membership, loading, spec, held)
            self._note_changes()
            self._changed.notify_all()
        return resumed

    def loaded(self, holder_id: str) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.loaded(holder_id)
            self._note_changes()
            self._changed.notify_all()

    def vacancy(self, applicant: Applicant, wait_s: float) -> Share | None:
        """See CoordinatorClient."""
        until = self._clock() + wait_s
        with self._changed:
            self._roster.waits(applicant, until)
            while True:
                if self._expired():
                    self._changed.notify_all()
                share = self._roster.vacancy(applicant, self._clock())
                left_s = until - self._clock()
                if share is not None:
                    self._experts.asked(applicant, self._clock())
                if share is not None or left_s <= 0:
                    return share
                self._changed.wait(min(left_s, _LOOK_S))

    def prepared(self, holder_id: str, order: int) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.prepared(holder_id, order)
            self._note_changes()
            self._changed.notify_all()

    def scale(self, expert_shards: int) -> ScaleStatus:
        """Have so many expert shards: each loads what it lacks while the others serve, and then one epoch has them all.

        Raises ValueError, for people, where there cannot be so many.
        """
        with self._changed:
            self._experts.scale(expert_shards, self._clock())
            self._note_changes()
            self._changed.notify_all()
            return self._experts.status(self._unplaced)

    def wanted_shards(self, known: int, wait_s: float) -> int:
        """How many expert shards there are to be: at once where that is not what is `known`, else after `wait_s`."""
        until = self._clock() + wait_s
        with self._changed:
            while self._roster.plan.wanted_shards == known and (left_s := until - self._clock()) > 0:
                self._changed.wait(left_s)
            self._experts.told(self._clock())
            return self._roster.plan.wanted_shards

    def scale_status(self) -> ScaleStatus:
        """How far the last change of the number of expert shards has come."""
        with self._changed:
            self._note_changes()
            return self._experts.status(self._unplaced)

    def neighbours(self, host: str) -> Mapping[str, LocalProcess]:
        """See CoordinatorClient."""
        with self._changed:
            experts = [holder for holder in self._roster.holders() if holder.seat.role == "expert"]
            found = {holder.holder_id: holder.address for holder in experts if holder.address.host == host}
            return {holder_id: address.local for holder_id, address in found.items() if address.local}

    def ended(self, holder_id: str) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.ended(holder_id, self._clock())
            self._note_changes()
            self._changed.notify_all()

    def poll(self, holder_id: str, wait_s: float, stats: Stats | None = None) -> Directive:
        """See CoordinatorClient."""
        until = self._clock() + wait_s
        with self._changed:
            self._roster.beat(holder_id, self._clock())
            if stats is not None:
                self._note_stats(holder_id, stats)
            while True:
                if self._expired():
                    self._changed.notify_all()
                directive = self._roster.directive(holder_id)
                left_s = until - self._clock()
                if directive.action != "stay" or left_s <= 0:
                    return replace(directive, refused_tokens=self._refused.tokens())
                self._changed.wait(min(left_s, 1.0))

    def serving(self, holder_id: str, epoch: int) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.serving(holder_id, epoch)
            self._note_changes()

    def left(self, holder_id: str, epoch: int, reason: str, suspect: str | None = None) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.left(holder_id, epoch, reason, self._clock(), suspect)
            self._note_changes()
            self._changed.notify_all()

    def retire(self, holder_id: str) -> bool:
        """See CoordinatorClient."""
        with self._changed:
            taking_part = self._roster.retire(holder_id)
            self._changed.notify_all()
        return taking_part

    def leave(self, holder_id: str, reason: str) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._roster.leave(holder_id, reason, self._clock())
            self._note_changes()
            self._changed.notify_all()

    def push_stats(self, holder_id: str, stats: Stats) -> None:
        """See CoordinatorClient."""
        with self._changed:
            self._note_stats(holder_id, stats)

    def bound(self, least_workers: int) -> None:
        """Have epochs form with so many attention workers from now on; the one that runs goes on."""
        with self._changed:
            self._roster.min_attention_workers = least_workers
            self._changed.notify_all()

    def report_progress(self, who: str, text: str) -> None:
        """Note what a rank that holds no seat yet is doing."""
        with self._changed:
            self._figures.progress[who] = text
            self._figures.failures.pop(who, None)

    def report_failure(self, who: str, text: str) -> None:
        """Note that a rank could not load."""
        with self._changed:
            self._figures.failures[who] = text

    def report_unplaced(self, text: str) -> None:
        """Note which processes have no node to run on, for people; empty where all have."""
        with self._changed:
            self._unplaced = text

    def own(self, owner_id: str, spec: str) -> bool:
        """Become the gang's owner in the place of a former one; False where it is a gang of another spec."""
        with self._changed:
            if spec == self._roster.spec:
                self._owner.take(owner_id)
                self._drain = Drain(self._clock)  # a former owner's, which did not come to its end
                self._changed.notify_all()
            return spec == self._roster.spec

    def keep(self, owner_id: str, wait_s: float) -> bool:
        """Stay the owner; returns after `wait_s`, or with False once another is."""
        until = self._clock() + wait_s
        with self._changed:
            while self._owner.keep(owner_id) and (left_s := until - self._clock()) > 0:
                self._changed.wait(left_s)
            return self._owner.keep(owner_id)

    @property
    def orphaned(self) -> bool:
        """Whether the gang has lost its owner for good."""
        with self._changed:
            return self._owner.lapsed

    def drain(self, grace_s: float) -> None:
        """Be ready no more; what runs may go on for so long. The ingress replicas hear of it by their reports."""
        with self._changed:
            self._drain.begin(grace_s)

    def report_open(self, ingress_id: str, answers: int, refused_tokens: int = 0) -> float | None:
        """An ingress replica has so many open answers; returns the seconds they may go on, None for any time.

        `refused_tokens`: of requests that it had no room for, and that may come again.
        """
        with self._changed:
            self._refused.report(ingress_id, refused_tokens)
            return self._drain.report(ingress_id, answers)

    def register_ingress(self, ingress_id: str, host: str, port: int, former: int | None = None) -> int:
        """An ingress replica is there, scraped on that port; returns its number. To be called every few seconds."""
        with self._changed:
            return self._figures.ingresses.renew(ingress_id, host, port, self._clock(), former)

    def open_answers(self) -> int:
        """Answers that the ingress replicas have open, by their last reports."""
        with self._changed:
            return self._drain.open_answers()

    def status(self, traceparent: str = "") -> CoordinatorStatus:
        """Readiness, the reason for it, and the last statistics of each seat.

        `traceparent` names the span of a request that asks, if it is traced.
        """
        with self._changed:
            if self._expired():
                self._changed.notify_all()
            figures, membership = self._figures, self._roster.membership
            return CoordinatorStatus(
                ready=self._roster.ready() and not self._drain.begun,
                reason=self._explain(),
                epoch=membership.epoch if membership is not None else 0,
                stats=figures.by_seat(self._roster.holders()),
                progress=dict(figures.progress),
                failures=dict(figures.failures),
                workers=0 if membership is None else len(membership.workers),
                recovering=(self._follows or figures.epochs > 0) and not self._drain.begun,
                gathering=self._roster.gathering,
                streams=tuple(holder.address.streams for holder in self._roster.holders() if holder.address.streams),
                gang=self._numbers(),
                targets=figures.targets(self.own_target, self._roster.holders(), self._clock()),
            )

    def numbers(self) -> Stats:
        """Seats, epochs and readiness in numbers."""
        with self._changed:
            ready = self._roster.ready() and not self._drain.begun
            return {"ready": float(ready), **self._numbers()}

    def _numbers(self) -> Stats:
        roster = self._roster
        filled = sum(1 for _ in roster.holders())
        of_gang = self._figures.of_gang(roster.shape, filled, roster.membership)
        refused = {"refused_tokens": self._refused.tokens()}
        return {**of_gang, **self._experts.numbers(), **self._stalls.numbers(), **refused}

    def _note_stats(self, holder_id: str, stats: Stats) -> None:
        self._figures.stats[holder_id] = stats
        self._experts.note_stats(holder_id, stats, self._clock())

    def _note_changes(self) -> None:
        if self._experts.look(self._clock()):
            self._changed.notify_all()
        roster = self._roster
        self._figures.count(roster.membership)
        self._stalls.look(roster.serves(), roster.in_order, roster.plan.last_change, self._clock())

    def _explain(self) -> str:
        if self._drain.begun:
            return "the server is shutting down"
        unplaced = self._unplaced if not self._roster.ready() else ""
        return "; ".join(filter(None, (self._roster.explain(), unplaced)))

    def _expired(self) -> bool:
        before = self._roster.membership
        self._roster.expire(self._clock())
        self._note_changes()
        return self._roster.membership is not before
