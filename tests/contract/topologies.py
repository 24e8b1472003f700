"""Gangs of every shape and mode, without a model: what each rank brings, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.all_to_all import AllToAll
from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.colocated import Colocated
from divisi.cluster.dispatch.local import Local
from divisi.cluster.dispatch.protocol import DispatchMode, Peers, ShardedMode, WorkerEnd
from divisi.cluster.dispatch.transport.groups import PeerGroup
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.passes import Pass
from divisi.cluster.seats import Address, GangShape
from divisi.model.placement import Layout, deal
from tests.support.gangs import CPU, SHARED, DenseExperts, full_pass, gang_groups, membership_of, serving_shards
from tests.support.plain_mode import Plain

LAYERS, EXPERTS, WIDTH, CHOSEN = 3, 7, 24, 3
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Topology:
    """A shape and the mode that is under test in it."""

    mode: str
    shape: GangShape
    spare: float = 100.0
    """Of all-to-all: how much room there is beyond the mean."""

    def __str__(self) -> str:
        return f"{self.mode}-{self.shape.attention_workers}x{self.shape.expert_shards}"

    def worker_mode(self, rank: int, transport: Transport) -> DispatchMode:
        if self.mode == "local":
            return Local(make_experts(self.shape, 0))
        if self.mode == "colocated":
            return Colocated(transport, make_experts(self.shape, rank))
        return self.sharded_mode(transport)

    def sharded_mode(self, transport: Transport) -> ShardedMode:
        if self.mode == "plain":
            return Plain(transport.wire.hidden_size, transport.wire.experts_per_token, transport.deadline_s, EXPERTS)
        if self.mode == "all_to_all":
            return AllToAll(transport, self.spare)
        return Broadcast(transport)


LOCAL = Topology("local", GangShape(1, 0))
SPLIT = [Topology("split", GangShape(workers, shards)) for workers in range(1, 5) for shards in range(1, 5)]
COLOCATED = [Topology("colocated", GangShape(ranks, ranks, colocated=True)) for ranks in range(1, 5)]
EXACT = [Topology("all_to_all", GangShape(a, e)) for a, e in ((1, 1), (1, 2), (1, 4), (1, 7), (2, 2), (2, 3), (2, 7))]
PLAIN = [Topology("plain", GangShape(workers, shards)) for workers, shards in ((1, 1), (2, 3))]
ALL = [LOCAL, *SPLIT, *EXACT, *COLOCATED, *PLAIN]

every_topology = pytest.mark.parametrize("topology", ALL, ids=str)
QUICK = [
    LOCAL,
    *(Topology("split", GangShape(a, e)) for a, e in ((1, 1), (1, 3), (2, 2), (4, 4))),
    *EXACT[2:],
    *COLOCATED,
    *PLAIN,
]
mostly_verify = pytest.mark.parametrize(
    "topology", [pytest.param(t, marks=() if t in QUICK else pytest.mark.verify) for t in ALL], ids=str
)
# of each way to carry rows, the smallest with peers
EACH_MODE = [
    Topology("split", GangShape(2, 2)),
    Topology("colocated", GangShape(3, 3, colocated=True)),
    Topology("all_to_all", GangShape(2, 2)),
    PLAIN[1],
]
each_mode = pytest.mark.parametrize("topology", EACH_MODE, ids=str)


def make_weights() -> Tensor:
    return torch.randn(LAYERS, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5


def make_experts(shape: GangShape, shard: int) -> DenseExperts:
    shares = deal(EXPERTS, max(shape.expert_shards, 1))
    return DenseExperts(make_weights(), shares[shard])


def make_batch(num_tokens: int, seed: int, only_expert: int | None = None) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, WIDTH, generator=rng)
    ids_TK = torch.rand(num_tokens, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].to(torch.int32).contiguous()
    gates_TK = torch.rand(num_tokens, CHOSEN, generator=rng)
    if only_expert is not None:
        ids_TK.fill_(only_expert)
    return x_TD, ids_TK, gates_TK


def make_transport(dtype: torch.dtype = torch.float32, deadline_s: float = 10.0) -> Transport:
    return Transport(WireFormat(WIDTH, CHOSEN, dtype, EXPERTS), 64, deadline_s, CPU, torch.float32)


def peers_of(shape: GangShape, groups: Sequence[PeerGroup], layout: Layout | None = None) -> list[Peers]:
    """By rank."""
    membership = membership_of(shape, Address("127.0.0.1"), layout=layout)
    return [Peers.of(membership, rank, lambda _, group=group: group) for rank, group in enumerate(groups)]  # type: ignore[misc]


def expert_ranks(shape: GangShape) -> range:
    """In shard order."""
    return range(shape.size) if shape.colocated else shape.shard_ranks


def run_worker(end: WorkerEnd, batches: Sequence[Batch | None], passes: Sequence[Pass]) -> list[Tensor]:
    """All layers of each pass; the sums, one after another. `batches` are what this worker brings to each."""
    sums = []
    for batch, step_pass in zip(batches, passes, strict=True):
        end.begin(step_pass)
        for layer in range(LAYERS):
            if batch is None:
                end.idle(layer)
            else:
                pending = end.dispatch(layer, *(tensor.clone() for tensor in batch))
                sums.append(pending.combine().clone())
    return sums


def run_all(
    topology: Topology,
    dtype: torch.dtype,
    per_worker: Sequence[Sequence[Batch | None]],
    epoch: int = 1,
    seats: Callable[[GangShape, Sequence[PeerGroup]], list[Peers]] = peers_of,
    memory: HostMemory | None = SHARED,
) -> list[list[Tensor]]:
    """The sums of each worker. `per_worker[w][s]` is what worker w brings to step s, None for no rows."""
    passes = [full_pass(*(0 if b is None else len(b[0]) for b in step)) for step in zip(*per_worker, strict=True)]
    transport, shape = make_transport(dtype), topology.shape
    with gang_groups(shape, epoch, memory) as groups:
        peers = seats(shape, groups)
        workers = peers[: shape.attention_workers]
        with serving(topology, peers, transport, passes), ThreadPoolExecutor(len(workers)) as pool:
            ends = [topology.worker_mode(each.seat, transport).worker_end(each) for each in workers]
            return list(pool.map(lambda end, batches: run_worker(end, batches, passes), ends, per_worker))


@contextmanager
def serving(topology: Topology, peers: Sequence[Peers], transport: Transport, passes: Sequence[Pass]) -> Iterator[None]:
    """The shards that are ranks of their own, if there are any."""
    shards = peers[topology.shape.attention_workers :]
    mode, steps = topology.sharded_mode(transport), [[step_pass] for step_pass in passes]
    with serving_shards(shards, mode, lambda shard: make_experts(topology.shape, shard), steps, range(LAYERS)):
        yield


def expected(batches: Sequence[Batch | None], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What `local` gives for x in such a dtype."""
    dense = DenseExperts(make_weights(), deal(EXPERTS, 1)[0])
    rows = [(b[0].to(dtype), *b[1:]) for b in batches if b is not None]
    return [dense.partial_sum(layer, *b) for b in rows for layer in range(LAYERS)]


def make_steps(shape: GangShape, sizes: Sequence[Sequence[int]], seed: int = 0) -> list[list[Batch | None]]:
    """What each worker brings to each step; `sizes` are rows of four counts, one for each possible worker."""
    return [
        [make_batch(row[w], seed=seed + 10 * s + w) if row[w] else None for s, row in enumerate(sizes)]
        for w in range(shape.attention_workers)
    ]


# one token, primes, everybody, and nobody but one: whoever brings none serves or is left out
SIZES = [(1, 16, 3, 5), (7, 1, 0, 0), (16, 0, 0, 1), (1, 7, 1, 1), (1, 0, 0, 0)]
