"""The thread that keeps a process in its seat: joins, renews the lease, passes epochs on. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.gang.membership.client import CoordinatorClient
from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.seats import Address, Membership, Role, Seat

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_POLL_S = 1.0
_ENTER_S = 0.02
_GIVE_UP_S = 30.0
"""Longer than a lease: who then still holds the seat that this process wants is no former self of it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a process offers the coordinator. Shards ask for their own seat; a worker takes any of its role."""

    role: Role
    address: Address
    index: int | None = None
    loads_for_seat: bool = False
    """Which weights it loads depends on the seat: it takes one first, and from then on no other."""
    spec: str = ""
    """The fingerprint of its spec."""


class HeldLeaves(Protocol):
    """The virtual shards that a shard's process holds; neither call waits for any to be loaded."""

    def stand(self) -> frozenset[int]:
        """Those that are held; what was ordered is void."""
        ...

    def prepare(self, order: int, leaves: frozenset[int]) -> None:
        """Hold these and no others, and then say so by the number of the order."""
        ...


class SeatWatch:
    """Holds a seat for a loop until stopped, through lost leases and coordinators that come and go.

    While there is no coordinator the epoch goes on. The next one is told who sits where, and in which epoch.
    """

    def __init__(
        self,
        connect: Callable[[], CoordinatorClient],
        candidate: Candidate,
        inbox: EpochInbox,
        stats: Callable[[], Stats | None],
        leaves: HeldLeaves | None = None,
    ) -> None:
        """`connect` raises CoordinatorLost while there is no coordinator; `stats` gives None when nothing changed.

        `leaves`: what a shard holds.
        """
        self._connect = connect
        self._candidate = candidate
        self._index = candidate.index
        self._first_seat: Future[Seat] = Future()
        self._loaded = threading.Event()
        self._wanting_since: float | None = None
        self._inbox = inbox
        self._stats = stats
        self._leaves = leaves
        self._stop = threading.Event()
        self._unheard = threading.Event()
        self._telling = threading.Lock()
        """So that a report of the loop and the word on where it is cannot overtake each other."""
        self._inside: Membership | None = None
        """Of the epoch that the loop was sent into, until it has left that one."""
        self._served = 0
        """The last epoch in which it has reached its peers."""
        self._outside = threading.Event()
        """Set while it is in none."""
        self._outside.set()
        self._told: Stats | None = None
        """The last statistics that a poll has carried."""
        self._client: CoordinatorClient | None = None
        self._holder_id = ""
        self.heard_at = time.monotonic()
        """When a coordinator has last answered."""
        self.refused_tokens = 0
        """What the gang had no room for, by the coordinator's last word."""
        self.superseded = threading.Event()
        """Another process has taken the one seat that this one can fill; the loop ends."""
        self.seat: Seat | None = None
        """The seat held now."""
        self._thread = threading.Thread(target=self._run, name="seat-watch", daemon=True)

    def start(self) -> None:
        """Begin to look for a seat."""
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Give the seat up. The loop is to be stopped first."""
        self._stop.set()
        if self._client is not None:
            with contextlib.suppress(CoordinatorLost):
                self._client.leave(self._holder_id, reason)
        self._thread.join(timeout=2 * _POLL_S)

    def wait_for_seat(self) -> Seat:
        """Block until a seat is held for the first time, however long that takes."""
        return self._first_seat.result()

    def loaded(self) -> None:
        """Report that the weights of the seat are there; for a candidate that `loads_for_seat`."""
        self._loaded.set()
        self._tell(lambda client: client.loaded(self._holder_id))

    @property
    def displaced(self) -> bool:
        """Whether other processes keep every seat that this one can fill, though it has held one before.

        What it was given to do waits for that seat. A process that never had one is a spare, and may wait.
        """
        since = self._wanting_since
        return self._first_seat.done() and since is not None and time.monotonic() - since > _GIVE_UP_S

    def serving(self, epoch: int) -> None:
        """For the loop: all peers of the epoch were reached."""
        self._served = epoch
        self._tell(lambda client: client.serving(self._holder_id, epoch))

    def left(self, epoch: int, reason: str, suspect: str | None = None) -> None:
        """For the loop: it is out of the epoch; `suspect`: the seats that it blames."""
        with self._telling:
            if self._inside is not None and self._inside.epoch <= epoch:
                self._inside = None
                self._outside.set()
            self._tell(lambda client: client.left(self._holder_id, epoch, reason, suspect))

    def prepared(self, order: int) -> None:
        """What was ordered by a `prepare` is held."""
        self._tell(lambda client: client.prepared(self._holder_id, order))

    def retire(self, within_s: float) -> None:
        """Leave the gang between two steps, so that none is aborted; done when the loop is in no epoch any more."""
        until = time.monotonic() + within_s
        while self._takes_part() and (left_s := until - time.monotonic()) > 0:
            # It may not have been told yet to enter the epoch that it is to leave.
            if self._outside.wait(left_s):
                self._stop.wait(_ENTER_S)

    def _takes_part(self) -> bool:
        taking_part: list[bool] = []
        self._tell(lambda client: taking_part.append(client.retire(self._holder_id)))
        return any(taking_part)

    @property
    def has_served(self) -> bool:
        """Whether the loop has reached its peers in some epoch."""
        return self._served > 0

    def push_stats(self, stats: Stats) -> None:
        """For the loop: new statistics that should not wait for the next poll."""
        self._tell(lambda client: client.push_stats(self._holder_id, stats))

    def _tell(self, call: Callable[[CoordinatorClient], None]) -> None:
        if self._client is not None:
            try:
                call(self._client)
            except CoordinatorLost:
                # It would wait for this report for ever, if it is there at all: it has to be told anew where this is.
                self._unheard.set()

    def _run(self) -> None:
        while not self._stop.is_set() and not self.superseded.is_set():
            try:
                self._client = self._connect()
                self._hold_seat(self._client)
            except CoordinatorLost:
                self._wanting_since = None  # nobody says that the seat is another's
                self._stop.wait(_RETRY_S)
            except Exception:  # whatever it was: without this thread the seat would stay empty for good
                log.exception("the seat watch failed and begins anew")
                self._stop.wait(_RETRY_S)
        self._give_up()

    def _hold_seat(self, client: CoordinatorClient) -> None:
        """Keep the seat or take one, and follow directives. Returns to begin anew; raises CoordinatorLost."""
        if self.seat is not None and not self._resume(client, self.seat):
            self._give_up()
            if self._candidate.index is not None:  # or the two would take it from each other for ever
                self.superseded.set()
                self._inbox.stop()
                return
        if self.seat is None:
            self._unheard.clear()
            self._holder_id = uuid.uuid4().hex
            self.seat = self._join(client)
            self.heard_at = time.monotonic()
        if self._stop.is_set():  # `stop` may have given the seat up before it was taken
            client.leave(self._holder_id, "it was stopped")
        if self.seat is None:
            self._stop.wait(_RETRY_S)
        else:
            self._follow(client, self.seat)

    def _follow(self, client: CoordinatorClient, seat: Seat) -> None:
        while not self._stop.is_set() and not self._unheard.is_set():
            stats = None if self._loading else self._stats()
            self._told = stats or self._told
            directive = client.poll(self._holder_id, _POLL_S, stats)
            self.heard_at = time.monotonic()
            self.refused_tokens = directive.refused_tokens
            match directive.action:
                case "enter" if directive.membership is not None:
                    membership = self._inside = directive.membership
                    self._outside.clear()
                    self._inbox.offer(Assignment(membership, membership.rank(seat)))
                case "change":
                    self._inbox.change(directive.epoch)
                case "leave":
                    self._inbox.interrupt(directive.epoch)
                case "prepare" if self._leaves is not None:
                    self._leaves.prepare(directive.order, directive.leaves)
                case "rejoin":
                    return

    def _resume(self, client: CoordinatorClient, seat: Seat) -> bool:
        """Tell a coordinator that may know nothing of it where this process is; whether it keeps its seat."""
        self._unheard.clear()
        candidate = self._candidate
        with self._telling:
            inside = self._inside
            held = client.resume(
                self._holder_id, seat, candidate.address, inside, self._loading, candidate.spec, self._held_leaves()
            )
            if held and inside is not None and self._served == inside.epoch:
                client.serving(self._holder_id, inside.epoch)
            if held and self._told is not None:
                client.push_stats(self._holder_id, self._told)
        return held

    def _give_up(self) -> None:
        """The seat is another's; the loop leaves the epoch."""
        self.seat = None
        if (inside := self._inside) is not None:
            self._inbox.interrupt(inside.epoch)

    @property
    def _loading(self) -> bool:
        return self._candidate.loads_for_seat and not self._loaded.is_set()

    def _held_leaves(self) -> frozenset[int] | None:
        return None if self._leaves is None else self._leaves.stand()

    def _join(self, client: CoordinatorClient) -> Seat | None:
        candidate = self._candidate
        loads = candidate.loads_for_seat
        seat = client.join(
            self._holder_id, candidate.role, candidate.address, self._index, loads, candidate.spec, self._held_leaves()
        )
        if seat is None:
            self._wanting_since = self._wanting_since or time.monotonic()
            return None
        self._wanting_since = None
        if loads:
            self._index = seat.index
        if loads and self._loaded.is_set():
            client.loaded(self._holder_id)
        if not self._first_seat.done():
            self._first_seat.set_result(seat)
        return seat
