"""What a way to carry rows to the experts consists of: a worker's end, a shard's end, and the mode that makes them.

A mode lasts as long as its rank, its ends as long as an epoch. In an epoch all ends see the same passes in the same
order; between two calls of `begin` each goes once through the pass's layers. A failed transfer ends an end's life: it
raises StepAborted, and the step is run again by the ends of the next epoch.

Within a mode everything goes by seat: whose rows come first in a batch, whose partial sum is added first. Ranks are
the addresses of one epoch's process group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from divisi.cluster.dispatch.transport.groups import PeerGroup
from divisi.cluster.passes import Pass
from divisi.cluster.seats import Membership
from divisi.kernels.mixture.layout import Routed
from divisi.model.dispatcher import Dispatcher
from divisi.model.experts import ExpertBank
from divisi.model.placement import Layout


class Experts(Protocol):
    """The routed experts that a rank holds."""

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """``y_TD`` fp32: per row, the sum of gate x expert(x) over those of its experts that are held here.

        In the fixed tree of `divisi.model.placement`. Where they make up several of its subtrees, the sum of each, one
        beside the other: D is so many times as wide.
        """
        ...


class AllExperts(Experts, Protocol):
    """All of them, on the rank whose rows they get: the sum may be left to what comes next."""

    @property
    def bank(self) -> ExpertBank | None:
        """See `divisi.model.dispatcher.InProcess`."""
        ...

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """As `partial_sum`, or its terms."""
        ...


class HeldExperts(Protocol):
    """The routed experts that a shard's process holds: what it serves of them is an epoch's."""

    @property
    def num_leaves(self) -> int:
        """Virtual shards of the model."""
        ...

    def serving(self, layout: Layout, seat: int) -> Experts:
        """Those that a seat serves in a layout. Raises LeavesNotHeld."""
        ...


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks of one epoch as one of them sees them."""

    seat: int
    """Index of its own seat, among those of its role."""
    workers: Mapping[int, int]
    """Rank by the index of each attention seat."""
    shards: Mapping[int, int]
    """Rank by the index of each share of the experts."""
    join: Callable[[int], PeerGroup]
    """Meets all ranks in a process group, which the epoch's end closes, given the bytes of the longest message. All
    ranks of an epoch call it, with the same number, or none."""
    layout: Layout | None = None
    """Which virtual shards each shard serves; None: dealt evenly."""

    @classmethod
    def of(cls, membership: Membership, rank: int, join: Callable[[int], PeerGroup]) -> Self:
        """As a rank of an epoch sees them."""
        return cls(membership.seats[rank].index, membership.workers, membership.shards, join, membership.layout)

    def layout_of(self, leaves: int) -> Layout:
        """Which of so many virtual shards each shard serves."""
        return self.layout or Layout.even(leaves, len(self.shards))


class WorkerEnd(Dispatcher, Protocol):
    """An attention worker's end. Whatever `combine` returns is valid until the next `dispatch`."""

    def begin(self, step_pass: Pass) -> None:
        """A pass begins: its layers come next. Raises StepAborted for more rows than there is room for."""
        ...

    def idle(self, layer: int) -> None:
        """Take part in a layer of a pass to which this worker brings no rows. Raises StepAborted."""
        ...

    def carried_all(self) -> bool:
        """After a step's passes: whether the experts got all of this worker's rows.

        If not, the step must not be committed; it has room for them when it is run again, next.
        """
        ...


class ShardEnd(Protocol):
    """The end of a rank that holds nothing but experts."""

    def begin(self, step_pass: Pass) -> None:
        """A pass begins: its layers come next. Raises StepAborted for more rows than there is room for."""
        ...

    def serve(self, layer: int) -> None:
        """Run the experts on the rows of all workers, and give each the sums of its own. Raises StepAborted."""
        ...


class DispatchMode(Protocol):
    """Makes the workers' ends."""

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """This worker's end in an epoch. Raises StepAborted."""
        ...


class ShardedMode(DispatchMode, Protocol):
    """A mode of gangs in which some ranks hold nothing but experts."""

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        """This shard's end in an epoch. Raises StepAborted."""
        ...
