"""A layer's messages without experts, ranks in processes of their own that share memory, in each mode.

Experts return zeros, so that what is left is what the planner's model is about. Ranks keep to their cores, and sleep
while they wait if they share some, as those of `divisi serve` do.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue

import torch
from torch import Tensor

from divisi.cluster.activity import Activity
from divisi.cluster.cores import keep_to, plan_cores
from divisi.cluster.dispatch.all_to_all import AllToAll
from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.planner import Load, Mode, hit_rate
from divisi.cluster.dispatch.protocol import Peers, ShardedMode
from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.host_memory import HostMemory
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.door import Credentials, Secret
from divisi.cluster.gang.loops.shard_loop import serve_steps
from divisi.cluster.gang.loops.threads import SPIN_S
from divisi.cluster.passes import Pass, PassKind, PassLayers
from divisi.cluster.seats import Address, GangShape, Membership

WIDTH, CHOSEN, EXPERTS, LEAVES, MOST = 2048, 10, 512, 32, 256
MODES: tuple[Mode, ...] = ("broadcast", "all_to_all")
_LAYERS = 48
_CREDENTIALS = Credentials(Secret(bytes(32)))
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Work:
    """What all ranks run, one after another: rounds of passes of each mode and number of rows."""

    shape: GangShape
    rows: Sequence[int]
    rounds: int
    sleeps: bool
    """Whether who waits gives up its core at once."""
    modes: Sequence[Mode] = MODES

    def passes(self) -> list[tuple[Mode, int]]:
        """Those of the first round are not measured."""
        return [(mode, rows) for _ in range(self.rounds + 1) for mode in self.modes for rows in self.rows]


class Nothing:
    """Experts that return zeros."""

    def __init__(self) -> None:
        self._y_TD = torch.zeros(MOST * 2, WIDTH)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """See Experts."""
        return self._y_TD[: len(x_TD)]


def transport() -> Transport:
    """Of rows as the 80 B model has them, in fp32 as on a CPU."""
    return Transport(WireFormat(WIDTH, CHOSEN, torch.float32, LEAVES), MOST, 30.0, _CPU, torch.float32)


def modes() -> dict[Mode, ShardedMode]:
    """Each of MODES."""
    return {"broadcast": Broadcast(transport()), "all_to_all": AllToAll(transport())}


def shares_cores(shape: GangShape) -> bool:
    """Whether there are more ranks than cores."""
    return shape.size > len(_cores())


def load_of(shape: GangShape, rows: int) -> Load:
    """As the planner sees it."""
    wire, workers, shards = transport().wire, shape.attention_workers, shape.expert_shards
    sizes = wire.request_bytes(1), wire.reply_bytes(1, 1)
    cores = len(_cores()) if shares_cores(shape) else math.inf
    return Load(workers, shards, rows, *sizes, hit_rate(CHOSEN, LEAVES, shards), cores)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a layer at the first worker and at the first shard: lower quartiles, as all else only adds to them."""

    whole_s: float
    """From its rows to their sums, at the worker."""
    worker_s: float
    shard_s: float
    """Of processor time, that of its waits left out."""


class _Clock(Activity):
    """Tells what a rank's thread has worked while it did not wait for others."""

    worked_s = 0.0
    _since = 0.0

    def waiting(self) -> None:
        """See Activity."""
        self.worked_s += time.thread_time() - self._since

    def goes_on(self) -> None:
        """See Activity."""
        self._since = time.thread_time()

    def timed(self, layers: Callable[[], None]) -> tuple[float, float]:
        """Seconds of a layer: from its begin to its end, and worked in it."""
        worked_s, begin = self.worked_s, time.perf_counter()
        self.goes_on()
        layers()
        self.waiting()
        return (time.perf_counter() - begin) / _LAYERS, (self.worked_s - worked_s) / _LAYERS


Case = tuple[Mode, int]
_Told = dict[Case, list[tuple[float, float]]]
"""Of each pass, see _Clock.timed."""


def measure(work: Work) -> dict[Case, Times]:
    """Times by mode and rows."""
    shape, store = work.shape, StoreServer("127.0.0.1", _CREDENTIALS)
    names, here = tuple(map(str, shape.seats)), (Address("127.0.0.1"),) * shape.size
    memberships = [Membership(epoch, shape, names, here, store.address) for epoch in (1, 2)]
    spawn = multiprocessing.get_context("spawn")
    queue: SimpleQueue[tuple[int, _Told]] = spawn.SimpleQueue()
    ranks = [
        spawn.Process(target=_run, args=(work, memberships, rank, queue), daemon=True) for rank in range(shape.size)
    ]
    for process in ranks:
        process.start()
    told = dict(queue.get() for _ in ranks)
    for process in ranks:
        process.join(20)
    store.close()
    worker, shard = told[0], told[shape.attention_workers]
    return {
        case: Times(_quartile(worker[case], 0), _quartile(worker[case], 1), _quartile(shard[case], 1))
        for case in worker
    }


def _quartile(told: Sequence[tuple[float, float]], which: int) -> float:
    return statistics.quantiles((times[which] for times in told), n=4, method="inclusive")[0]


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _run(work: Work, memberships: Sequence[Membership], rank: int, queue: SimpleQueue[tuple[int, _Told]]) -> None:
    torch.set_num_threads(1)
    keep_to(plan_cores(_cores(), work.shape.size, 1).ranks[rank])
    ways, clock = modes(), _Clock()

    def peers(membership: Membership) -> Peers:
        def join(largest: int) -> PeerGroup:
            memory = HostMemory(largest, 0.0 if work.sleeps else SPIN_S)
            return join_group(membership, rank, _CPU, 120.0, _CREDENTIALS, activity=clock, memory=memory)

        return Peers.of(membership, rank, join)

    each = {name: peers(membership) for name, membership in zip(ways, memberships, strict=True)}
    seat = work.shape.seat(rank)
    walk = _worker(ways, each, seat.index) if seat.role == "attention" else _shard(ways, each)
    told: _Told = {}
    for index, (mode, rows) in enumerate(work.passes()):
        layers = walk(mode, Pass(PassKind.FULL, dict.fromkeys(range(work.shape.attention_workers), rows)))
        times = clock.timed(layers)
        if index >= len(work.modes) * len(work.rows):
            told.setdefault((mode, rows), []).append(times)
    queue.put((rank, told))


_Walk = Callable[[Mode, Pass], Callable[[], None]]
"""Prepares a pass, and returns what takes it through the layers."""


def _shard(ways: Mapping[Mode, ShardedMode], each: Mapping[Mode, Peers]) -> _Walk:
    ends = {name: way.shard_end(each[name], Nothing()) for name, way in ways.items()}
    return lambda mode, step_pass: partial(serve_steps, [[step_pass]], ends[mode], PassLayers(full=range(_LAYERS)))


def _worker(ways: Mapping[Mode, ShardedMode], each: Mapping[Mode, Peers], seat: int) -> _Walk:
    ends = {name: way.worker_end(each[name]) for name, way in ways.items()}
    rng = torch.Generator().manual_seed(seat)

    def walk(mode: Mode, step_pass: Pass) -> Callable[[], None]:
        rows, end = step_pass.rows(seat), ends[mode]
        x_TD, gates_TK = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, CHOSEN, generator=rng)
        ids_TK = torch.rand(rows, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].int().contiguous()
        end.begin(step_pass)

        @torch.inference_mode()  # as an engine's step is
        def layers() -> None:
            for layer in range(_LAYERS):
                end.dispatch(layer, x_TD, ids_TK, gates_TK).combine()

        return layers

    return walk
