"""The coordinator as the processes of its gang see it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.seats import Address, LocalProcess, Membership, Role, Seat


class CoordinatorClient(Protocol):
    """The coordinator as a holder sees it. Every call may raise CoordinatorLost."""

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
        """Take a seat; None when all of the role are held, or when the gang has another spec than that fingerprint's.

        `loading`: to load the weights of that seat first. `held`: the virtual shards that a shard holds.
        """
        ...

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
        """Go on in a seat that this coordinator has given, or a former one; False when it is another's by now.

        `membership`: of the epoch that the holder is in. `held`: see `join`.
        """
        ...

    def loaded(self, holder_id: str) -> None:
        """Report to have the seat's weights."""
        ...

    def vacancy(self, applicant: Applicant, wait_s: float) -> Share | None:
        """Wait up to `wait_s` for a share of the experts that the applicant is to load, and then to join for."""
        ...

    def prepared(self, holder_id: str, order: int) -> None:
        """Report to hold what a `prepare` with that order has told."""
        ...

    def neighbours(self, host: str) -> Mapping[str, LocalProcess]:
        """The processes on a machine that hold experts' seats, by holder."""
        ...

    def ended(self, holder_id: str) -> None:
        """Report that a neighbour's process has ended."""
        ...

    def poll(self, holder_id: str, wait_s: float, stats: Stats | None = None) -> Directive:
        """Renew the lease and wait up to `wait_s` for something to do. New `stats` replace the holder's former ones."""
        ...

    def serving(self, holder_id: str, epoch: int) -> None:
        """Report that all peers of an epoch were reached."""
        ...

    def left(self, holder_id: str, epoch: int, reason: str, suspect: str | None = None) -> None:
        """Report to be out of an epoch, why, and for whose sake (seats)."""
        ...

    def retire(self, holder_id: str) -> bool:
        """Ask to be left out of the next epoch, and for that to begin between two steps; whether one has it yet."""
        ...

    def leave(self, holder_id: str, reason: str) -> None:
        """Give the seat up."""
        ...

    def push_stats(self, holder_id: str, stats: Stats) -> None:
        """Replace the holder's statistics without waiting for an answer."""
        ...
