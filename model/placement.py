"""Which rank of a gang holds what: the attention side, and which of the routed experts. Free of torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Self

from divisi.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Role:
    """What a rank holds: the attention side, some routed experts, or both."""

    name: str
    """The seat's name: `attention:0`, `expert:2`, `local`."""
    attention: bool
    experts: range

    @classmethod
    def all_of(
        cls, config: ModelConfig, attention_workers: int, expert_shards: int, colocated: bool = False
    ) -> tuple[Self, ...]:
        """Every rank of a gang; without expert shards, one rank that holds it all.

        `colocated`: the workers hold the shards, of which there are as many.
        """
        if expert_shards == 0:
            return (cls("local", True, range(config.num_experts)),)
        if colocated:
            shares = shard_experts(config, attention_workers)
            return tuple(cls(f"attention:{i}", True, experts) for i, experts in enumerate(shares))
        workers = tuple(cls(f"attention:{i}", True, range(0)) for i in range(attention_workers))
        shards = shard_experts(config, expert_shards)
        return workers + tuple(cls(f"expert:{i}", False, experts) for i, experts in enumerate(shards))


def shard_experts(config: ModelConfig, num_shards: int) -> tuple[range, ...]:
    """Contiguous expert ids of each shard; sizes differ by one at most, the larger ones first.

    Raises ValueError where a shard would get none.
    """
    if not 1 <= num_shards <= config.num_experts:
        raise ValueError(
            f"cannot share {config.num_experts} experts among {num_shards} shards; "
            f"use 1 to {config.num_experts} expert shards"
        )
    size, extra = divmod(config.num_experts, num_shards)
    bounds = [i * size + min(i, extra) for i in range(num_shards + 1)]
    return tuple(range(low, high) for low, high in itertools.pairwise(bounds))
