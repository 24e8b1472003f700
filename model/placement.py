"""Which rank of a gang holds what: the attention side, and which of the routed experts. Free of torch.

The experts of a layer are dealt, interleaved, to a fixed number of *virtual shards*: the leaves of a binary tree in
which a token's experts are summed, whatever the number of real shards. Which of them a real shard serves is said by an
epoch's layout; where nothing else is wanted, consecutive ones, and so few whole subtrees.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from divisi.model.config import ModelConfig

VIRTUAL_SHARDS = 32
"""By default; a model with fewer experts has as many as experts. The most shards that a gang can have, too."""


@dataclass(frozen=True, slots=True)
class Role:
    """What a rank holds: the attention side, some routed experts, or both."""

    name: str
    """The seat's name: `attention:0`, `expert:2`, `local`."""
    attention: bool
    experts: Sequence[int]

    @classmethod
    def all_of(
        cls,
        config: ModelConfig,
        attention_workers: int,
        expert_shards: int,
        colocated: bool = False,
        virtual_shards: int = VIRTUAL_SHARDS,
    ) -> tuple[Self, ...]:
        """Every rank of a gang; without expert shards, one rank that holds it all.

        `colocated`: the workers hold the shards, of which there are as many. Raises ValueError as `shard_experts` does.
        """
        if expert_shards == 0:
            return (cls("local", True, range(config.num_experts)),)
        shares = [share.expert_ids for share in shard_experts(config, expert_shards, virtual_shards)]
        if colocated:
            return tuple(cls(f"attention:{i}", True, experts) for i, experts in enumerate(shares))
        workers = tuple(cls(f"attention:{i}", True, ()) for i in range(attention_workers))
        return workers + tuple(cls(f"expert:{i}", False, experts) for i, experts in enumerate(shares))


@dataclass(frozen=True, slots=True)
class Layout:
    """Which virtual shards each expert seat serves in an epoch; never changes. Raises ValueError unless it is whole."""

    leaves: int
    """Of the tree: how many virtual shards there are."""
    served: tuple[tuple[int, ...], ...]
    """By the index of the seat, ascending, together each leaf once; who serves none has no part in the epoch."""

    def __post_init__(self) -> None:
        served = sorted(leaf for own in self.served for leaf in own)
        if served != list(range(self.leaves)) or any(list(own) != sorted(own) for own in self.served):
            raise ValueError(f"a layout names each of {self.leaves} virtual shards once, in ascending order: {self}")

    @classmethod
    def even(cls, leaves: int, num_shards: int) -> Self:
        """Consecutive leaves for each of so many shards; their numbers differ by one at most, the larger ones first."""
        size, extra = divmod(leaves, num_shards)
        bounds = [i * size + min(i, extra) for i in range(num_shards + 1)]
        return cls(leaves, tuple(tuple(range(low, high)) for low, high in itertools.pairwise(bounds)))

    def subtrees(self, seat: int) -> tuple[range, ...]:
        """The largest that cover what a seat serves; it returns one sum for each of them."""
        return subtrees(self.leaves, self.served[seat])

    @property
    def server(self) -> list[int]:
        """The seat that serves each leaf."""
        seat_of = {leaf: seat for seat, own in enumerate(self.served) for leaf in own}
        return [seat_of[leaf] for leaf in range(self.leaves)]

    @property
    def seats(self) -> tuple[int, ...]:
        """Those that serve any leaf, ascending."""
        return tuple(seat for seat, own in enumerate(self.served) if own)


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """The experts that one rank holds, and where they are in the tree."""

    expert_ids: tuple[int, ...]
    """Ascending."""
    leaves: int
    """Of the whole tree: expert `e` is dealt to leaf `e % leaves`."""
    subtrees: tuple[range, ...]
    """The largest that cover the leaves held, each given by its leaves: one where shards are a power of two."""


def whole_share(config: ModelConfig, virtual_shards: int = VIRTUAL_SHARDS) -> ExpertShare:
    """All experts of a model."""
    return shard_experts(config, 1, virtual_shards)[0]


def shard_experts(
    config: ModelConfig, num_shards: int, virtual_shards: int = VIRTUAL_SHARDS
) -> tuple[ExpertShare, ...]:
    """What each shard holds. Raises ValueError where a shard would get nothing."""
    return deal(config.num_experts, num_shards, virtual_shards)


def deal(num_experts: int, num_shards: int, virtual_shards: int = VIRTUAL_SHARDS) -> tuple[ExpertShare, ...]:
    """As `shard_experts`, of so many experts."""
    leaves = min(virtual_shards, num_experts)
    if not 1 <= num_shards <= leaves:
        raise ValueError(
            f"cannot share {num_experts} experts in {leaves} virtual shards among {num_shards} shards; "
            f"use 1 to {leaves} expert shards, or more virtual shards (at most one for each expert)"
        )
    served = Layout.even(leaves, num_shards).served
    return tuple(share_of(num_experts, leaves, own) for own in served)


def share_of(num_experts: int, leaves: int, own: Collection[int]) -> ExpertShare:
    """The share that some of so many leaves are."""
    return ExpertShare(tuple(e for e in range(num_experts) if e % leaves in own), leaves, subtrees(leaves, own))


def subtrees(leaves: int, own: Collection[int]) -> tuple[range, ...]:
    """The largest subtrees that cover some of so many leaves and no other, from left to right."""

    def cover(tree: range) -> Iterator[range]:
        there = [leaf in own for leaf in tree if leaf < leaves]
        if there and all(there):
            yield tree
        elif any(there):
            half = len(tree) // 2
            yield from (*cover(tree[:half]), *cover(tree[half:]))

    return tuple(cover(range(1 << (leaves - 1).bit_length())))


def additions(trees: Sequence[range]) -> list[tuple[int, int]]:
    """How sums over these subtrees, given in the order of their leaves, are added up in the fixed tree.

    In this order, sum `j` is added to sum `i` for each `(i, j)`; the whole sum is then the first. Two neighbours are
    added once they have no nearer relative to come.
    """
    steps: list[tuple[int, int]] = []
    waiting: list[tuple[int, int]] = []  # the first leaf, and the sum

    def add() -> None:
        (_, right), (leaf, left) = waiting.pop(), waiting.pop()
        steps.append((left, right))
        waiting.append((leaf, left))

    for index, tree in enumerate(trees):
        while len(waiting) > 1 and waiting[-2][0] ^ waiting[-1][0] < waiting[-1][0] ^ tree.start:
            add()
        waiting.append((tree.start, index))
    while len(waiting) > 1:
        add()
    return steps


def runs_of(expert_ids: Sequence[int]) -> str:
    """Ascending ids as half-open runs: `0:16,32:48`."""
    starts = [e for e in expert_ids if e - 1 not in expert_ids]
    ends = [e + 1 for e in expert_ids if e + 1 not in expert_ids]
    return ",".join(f"{start}:{end}" for start, end in zip(starts, ends, strict=True))
