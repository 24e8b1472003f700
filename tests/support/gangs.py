"""Gangs inside one process: real sockets and gloo groups, ranks in threads, experts with a dense reference."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import ShardExchange
from divisi.cluster.dispatch.groups import PeerGroup, StoreServer, join_group
from divisi.cluster.dispatch.wire import WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import Address, GangShape, Membership

CPU = torch.device("cpu")


@dataclass(frozen=True)
class DenseExperts:
    """Experts small enough to compute one token at a time. `held` are the ids that this rank has."""

    weights_LEDD: Tensor
    held: frozenset[int]

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        for t, (ids, gates) in enumerate(zip(expert_ids_TK.tolist(), gates_TK, strict=True)):
            for expert, gate in zip(ids, gates, strict=True):
                if expert in self.held:
                    y_TD[t] += gate * torch.tanh(self.weights_LEDD[layer, expert] @ x_TD[t].float())
        return y_TD


def split(num_experts: int, num_shards: int) -> list[frozenset[int]]:
    """Contiguous shares that differ by one at most."""
    size, extra = divmod(num_experts, num_shards)
    bounds = [i * size + min(i, extra) for i in range(num_shards + 1)]
    return [frozenset(range(a, b)) for a, b in pairwise(bounds)]


@contextmanager
def gang_groups(shape: GangShape, epoch: int = 1) -> Iterator[list[PeerGroup]]:
    """The gloo groups of all ranks, in rank order."""
    store = StoreServer("127.0.0.1")
    address = Address("127.0.0.1")
    membership = Membership(epoch, shape, tuple(map(str, shape.seats)), (address,) * shape.size, store.address)
    with ThreadPoolExecutor(shape.size) as pool:
        groups = list(pool.map(lambda rank: join_group(membership, rank, CPU, 20.0), range(shape.size)))
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


@contextmanager
def serving_shards(
    shape: GangShape,
    groups: Sequence[PeerGroup],
    wire: WireFormat,
    experts: Callable[[int], DenseExperts],
    steps: Sequence[Sequence[int]],
    layers: Sequence[int],
    max_tokens: int = 64,
) -> Iterator[None]:
    """Shards in threads that serve the steps whose token counts are given; errors of theirs are raised at the end."""
    errors: list[BaseException] = []

    def serve(shard: int) -> None:
        exchange = ShardExchange(
            groups[shape.attention_workers + shard],
            shape.attention_ranks,
            wire,
            max_tokens,
            10.0,
            CPU,
            torch.float32,
        )
        bank = experts(shard)
        try:
            for counts in steps:
                for layer in layers:
                    exchange.reply(counts, bank.partial_sum(layer, *exchange.receive(counts)))
        except StepAborted as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(shard,)) for shard in range(len(shape.shard_ranks))]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
