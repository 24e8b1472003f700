"""Who is told of the steps of a rank, as they go. Imports no torch.

All calls but `submitted` come from the loop's own thread, some a few times a step: none may block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from divisi.cluster.gang.control.header import Header
from divisi.cluster.passes import Pass
from divisi.cluster.request import Request, TokenEvent

PlanT = TypeVar("PlanT", contravariant=True)


class WorkerObserver(Protocol[PlanT]):
    """Of an attention worker's loop. `plan` is None in a step to which the worker brings nothing."""

    def submitted(self, request: Request, arrived: float) -> None:
        """The engine has taken a request that arrived then, by `perf_counter`."""
        ...

    def mark(self) -> bytes:
        """For the leader: what the next step's header shall carry for the observers; at most 255 bytes."""
        ...

    def began(self, header: Header, plan: PlanT | None) -> None:
        """A step begins."""
        ...

    def pass_began(self, step_pass: Pass, rows: int) -> None:
        """A pass of a step whose header is marked begins, with so many rows of this worker's."""
        ...

    def pass_ended(self) -> None:
        """It has ended."""
        ...

    def ended(self, plan: PlanT | None) -> None:
        """The step is committed."""
        ...

    def aborted(self, reason: str) -> None:
        """The step, if one is under way, will be run again in another epoch."""
        ...

    def told(self, events: Sequence[TokenEvent]) -> None:
        """Events that go to the ingresses."""
        ...


class ShardObserver(Protocol):
    """Of an expert shard's loop."""

    def began(self, header: Header) -> None:
        """A step begins."""
        ...

    def pass_began(self, step_pass: Pass) -> None:
        """A pass of a step whose header is marked begins."""
        ...

    def pass_ended(self) -> None:
        """It has ended."""
        ...

    def ended(self, failure: str = "") -> None:
        """The step has ended, by a failure where there is one."""
        ...


class NobodyObserves:
    """Implements WorkerObserver."""

    def submitted(self, request: Request, arrived: float) -> None:
        """See WorkerObserver."""

    def mark(self) -> bytes:
        """See WorkerObserver."""
        return b""

    def began(self, header: Header, plan: object) -> None:
        """See WorkerObserver."""

    def pass_began(self, step_pass: Pass, rows: int) -> None:
        """See WorkerObserver."""

    def pass_ended(self) -> None:
        """See WorkerObserver."""

    def ended(self, plan: object) -> None:
        """See WorkerObserver."""

    def aborted(self, reason: str) -> None:
        """See WorkerObserver."""

    def told(self, events: Sequence[TokenEvent]) -> None:
        """See WorkerObserver."""
