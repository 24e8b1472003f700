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

from divisi.cluster.dispatch.groups import PeerGroup, StoreServer, join_group
from divisi.cluster.dispatch.protocol import Peers, ShardedMode
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.shard_loop import serve_steps
from divisi.cluster.passes import Pass, PassKind, PassLayers
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


def membership_of(shape: GangShape, store: Address, epoch: int = 1) -> Membership:
    """Of all seats."""
    return Membership(epoch, shape, tuple(map(str, shape.seats)), (Address("127.0.0.1"),) * shape.size, store)


@contextmanager
def gang_groups(shape: GangShape, epoch: int = 1) -> Iterator[list[PeerGroup]]:
    """The gloo groups of all ranks, in rank order."""
    store = StoreServer("127.0.0.1")
    membership = membership_of(shape, store.address, epoch)
    with ThreadPoolExecutor(shape.size) as pool:
        groups = list(pool.map(lambda rank: join_group(membership, rank, CPU, 20.0), range(shape.size)))
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


def full_pass(*counts: int) -> Pass:
    """A full pass to which the workers bring so many rows, in the order of their seats."""
    return Pass(PassKind.FULL, dict(enumerate(counts)))


@contextmanager
def serving_shards(
    shards: Sequence[Peers],
    mode: ShardedMode,
    experts: Callable[[int], DenseExperts],
    steps: Sequence[Sequence[Pass]],
    layers: Sequence[int],
) -> Iterator[None]:
    """Shards in threads that serve steps of full passes, as the product does; their errors are raised at the end."""
    errors: list[BaseException] = []

    def serve(peers: Peers) -> None:
        try:
            serve_steps(steps, mode.shard_end(peers, experts(peers.seat)), PassLayers(full=layers))
        except StepAborted as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(peers,)) for peers in shards]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
