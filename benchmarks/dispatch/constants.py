"""What the planner's model is made of, measured on this machine: a message, a byte, and picking rows out.

A message and its bytes: broadcast to one shard, of few rows and of many. Picking: what both ends of all-to-all do more
than those of broadcast, in one thread that waits for nobody. Neither is what the model is held against.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from divisi.benchmarks.dispatch.layers import CHOSEN, EXPERTS, WIDTH, Nothing, Work, load_of, measure, modes
from divisi.cluster.dispatch.planner import Link, Mode
from divisi.cluster.dispatch.protocol import Peers
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import GangShape

_SHAPE = GangShape(1, 1)
_ROWS = (2, 96)
_TURNS = 300


def link(rounds: int, spin_s: float) -> Link:
    """Of ranks that share memory, and spin for so long when they wait."""
    few, many = _ROWS
    layer = measure(Work(_SHAPE, _ROWS, rounds, ("broadcast",)), spin_s)
    picking = {rows: _alone_s("all_to_all", rows) - _alone_s("broadcast", rows) for rows in _ROWS}
    load = load_of(_SHAPE, 1)
    row_bytes = load.request_bytes + load.reply_bytes
    byte_s = (layer["broadcast", many] - layer["broadcast", few]) / ((many - few) * row_bytes)
    picked_s = max(picking[many] - picking[few], 0.0) / ((many - few) * row_bytes)
    return Link(
        message_s=layer["broadcast", few] - few * row_bytes * byte_s,
        bytes_per_s=1.0 / byte_s,
        pick_s=picking[few] - few * row_bytes * picked_s,
        picked_bytes_per_s=1.0 / max(picked_s, 1e-15),
    )


@dataclass(frozen=True, slots=True)
class _Message:
    """A transfer in one thread: who waits for what comes copies it."""

    sent: deque[Tensor] | None = None
    into: Tensor = field(default_factory=lambda: torch.empty(0))

    def wait(self, deadline: float) -> None:
        """See Transfer."""
        if self.sent is not None:
            data = self.sent.popleft()
            self.into[: len(data)].copy_(data)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One end of a group of two in one thread. Implements PeerGroup."""

    out: deque[Tensor]
    into: deque[Tensor]

    def send(self, data: Tensor, rank: int) -> _Message:
        """See PeerGroup."""
        self.out.append(data)
        return _Message()

    def recv(self, data: Tensor, rank: int) -> _Message:
        """See PeerGroup."""
        return _Message(self.into, data)

    def interrupt(self) -> None:
        """See PeerGroup."""

    def close(self) -> None:
        """See PeerGroup."""


def _alone_s(mode: Mode, rows: int) -> float:
    """Median seconds of both ends of a layer, without experts, one after the other."""
    there: deque[Tensor] = deque()
    back: deque[Tensor] = deque()
    groups = _Pair(there, back), _Pair(back, there)
    worker = modes()[mode].worker_end(Peers(0, {0: 0}, {0: 1}, lambda _: groups[0]))
    shard = modes()[mode].shard_end(Peers(0, {0: 0}, {0: 1}, lambda _: groups[1]), Nothing())
    rng, step_pass = torch.Generator().manual_seed(rows), Pass(PassKind.FULL, {0: rows})
    x_TD, gates_TK = torch.randn(rows, WIDTH, generator=rng), torch.rand(rows, CHOSEN, generator=rng)
    ids_TK = torch.rand(rows, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].int().contiguous()
    worker.begin(step_pass)
    shard.begin(step_pass)
    times = []
    for _ in range(_TURNS):
        begin = time.perf_counter()
        pending = worker.dispatch(0, x_TD, ids_TK, gates_TK)
        shard.serve(0)
        pending.combine()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


