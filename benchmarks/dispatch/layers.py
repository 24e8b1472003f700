"""A layer's messages without experts, ranks in processes of their own that share memory: each mode, each reply's form.

Experts return zeros, so that what is left is what the planner's model is about.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from divisi.cluster.dispatch.all_to_all import AllToAll
from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.groups import PeerGroup, join_group
from divisi.cluster.dispatch.host_memory import HostMemory
from divisi.cluster.dispatch.planner import Load, Mode, hit_rate
from divisi.cluster.dispatch.protocol import Peers, ShardedMode
from divisi.cluster.dispatch.rendezvous import StoreServer
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.door import Credentials, Secret
from divisi.cluster.gang.loops.shard_loop import serve_steps
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


def load_of(shape: GangShape, rows: int) -> Load:
    """As the planner sees it."""
    wire = transport().wire
    hit = hit_rate(CHOSEN, LEAVES, shape.expert_shards)
    return Load(shape.attention_workers, shape.expert_shards, rows, wire.request_bytes(1), wire.reply_bytes(1, 1), hit)


def measure(work: Work, spin_s: float) -> dict[tuple[Mode, int], float]:
    """Median seconds of a layer, by mode and rows, as the first worker has it."""
    store = StoreServer("127.0.0.1", _CREDENTIALS)
    names, here = tuple(map(str, work.shape.seats)), (Address("127.0.0.1"),) * work.shape.size
    memberships = [Membership(epoch, work.shape, names, here, store.address) for epoch in (1, 2)]
    spawn, (mine, theirs) = multiprocessing.get_context("spawn"), multiprocessing.Pipe()
    ranks = [
        spawn.Process(target=_run, args=(work, memberships, rank, spin_s, theirs), daemon=True)
        for rank in range(work.shape.size)
    ]
    for rank in ranks:
        rank.start()
    times: dict[tuple[Mode, int], list[float]] = mine.recv()
    for rank in ranks:
        rank.join(20)
    return {case: statistics.median(of_case) for case, of_case in times.items()}


def _run(work: Work, memberships: Sequence[Membership], rank: int, spin_s: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    ways, seat, layers = modes(), work.shape.seat(rank), range(_LAYERS)

    def peers(membership: Membership) -> Peers:
        def join(largest: int) -> PeerGroup:
            memory = HostMemory(largest, spin_s)
            return join_group(membership, rank, _CPU, 120.0, _CREDENTIALS, memory=memory)

        return Peers.of(membership, rank, join)

    each = {name: peers(membership) for name, membership in zip(ways, memberships, strict=True)}
    passes = [(mode, Pass(PassKind.FULL, dict.fromkeys(range(work.shape.attention_workers), rows)))
              for mode, rows in work.passes()]  # fmt: skip
    if seat.role == "expert":
        shards = {name: way.shard_end(each[name], Nothing()) for name, way in ways.items()}
        for mode, step_pass in passes:
            serve_steps([[step_pass]], shards[mode], PassLayers(full=layers))
        return
    workers = {name: way.worker_end(each[name]) for name, way in ways.items()}
    times: dict[tuple[Mode, int], list[float]] = {}
    rng = torch.Generator().manual_seed(rank)
    for index, (mode, step_pass) in enumerate(passes):
        rows, end = step_pass.rows(seat.index), workers[mode]
        x_TD, gates_TK = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, CHOSEN, generator=rng)
        ids_TK = torch.rand(rows, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].int().contiguous()
        end.begin(step_pass)
        begin = time.perf_counter()
        for layer in layers:
            end.dispatch(layer, x_TD, ids_TK, gates_TK).combine()
        if index >= len(work.modes) * len(work.rows):
            times.setdefault((mode, rows), []).append((time.perf_counter() - begin) / _LAYERS)
    if rank == 0:
        pipe.send(times)
