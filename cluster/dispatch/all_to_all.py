"""All-to-all dispatch, both ends: each row goes once to each shard that it visits, with all its ids and gates.

How many rows come stands in the message, so there is no exchange of counts before: a receiver has room for the most.
A sender has room for as many as a pass of its size sends with near certainty. Where more rows visit a shard, those
beyond are left out, the layers go on so that nobody waits, and the step does not count: the worker's next one has room
for all of its rows.

The order of summation is that of all modes, and so are the results, bit for bit. Not for NCCL, where both ends of a
transfer must name the same size.

Shapes: T rows of a worker, N rows that visit a shard, D model width, K experts per row, S subtrees, B bytes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import ShardBatch, ShardSum, wait_for
from divisi.cluster.dispatch.planner import visit_rate
from divisi.cluster.dispatch.protocol import Experts, Peers, ShardEnd, WorkerEnd
from divisi.cluster.dispatch.transport.groups import Transfer
from divisi.cluster.dispatch.wire import Transport
from divisi.cluster.passes import Pass


@dataclass(frozen=True, slots=True)
class AllToAll:
    """A mode of gangs whose experts are on ranks of their own, for so many that a row misses most of them."""

    transport: Transport
    spare: float = 5.0
    """Room beyond the mean of rows that visit a shard, in standard deviations."""

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """See DispatchMode."""
        return _WorkerEnd(peers, self.transport, self.spare)

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        """See ShardedMode."""
        return _ShardEnd(peers, experts, self.transport)


def capacity(rows: int, hit: float, spare: float) -> int:
    """Rows of so many that a message to a shard has room for; those of 64 and 40 rows are made for the same number."""
    bucket = 1 << (rows - 1).bit_length()
    mean = bucket * hit
    return min(rows, math.ceil(mean + spare * math.sqrt(mean * (1.0 - hit))))


class _WorkerEnd:
    """One message to each shard per layer, and one from each that has rows."""

    def __init__(self, peers: Peers, transport: Transport, spare: float) -> None:
        wire, most = transport.wire, transport.max_pass_rows
        self._seat, self._transport = peers.seat, transport
        layout = peers.layout_of(wire.leaves)
        self._group = peers.join(transport.largest(layout))
        self._ranks = [peers.shards[seat] for seat in layout.seats]
        self._trees = [layout.subtrees(seat) for seat in layout.seats]
        self._shard_L = torch.tensor([layout.seats.index(seat) for seat in layout.server], device=transport.device)
        shares = [len(layout.served[seat]) / wire.leaves for seat in layout.seats]
        self._hits, self._spare = [visit_rate(wire.experts_per_token, share) for share in shares], spare
        self._requests_B = [transport.buffer(wire.counted_bytes(most)) for _ in self._ranks]
        self._replies_B = [transport.buffer(wire.reply_bytes(most, len(trees))) for trees in self._trees]
        self._sums_B = [transport.buffer(wire.reply_bytes(most, len(trees))) for trees in self._trees]
        self._sum = ShardSum(transport, self._trees)
        self._full, self._overflowed = False, False

    def begin(self, step_pass: Pass) -> None:
        """See WorkerEnd."""
        self._transport.check(step_pass)
        rows, wire = step_pass.rows(self._seat), self._transport.wire
        whole = self._full or not rows
        self._room = [rows if whole else capacity(rows, hit, self._spare) for hit in self._hits]
        sums = zip(self._sums_B, self._trees, strict=True)
        self._sums_TSD = [wire.reply(sums_B, rows, len(trees)) for sums_B, trees in sums]
        if rows:
            self._sum.begin(self._sums_TSD)
            self._visits_ET = torch.zeros(len(self._ranks), rows, dtype=torch.bool, device=self._transport.device)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _Visits:
        """See `divisi.model.dispatcher.Dispatcher`. Raises StepAborted."""
        wire = self._transport.wire
        shard_TK = self._shard_L[expert_ids_TK.long() % wire.leaves]
        self._visits_ET.zero_().scatter_(0, shard_TK.T, True)
        transfers, visitors = [], []
        for shard, rank in enumerate(self._ranks):
            rows_N = self._visits_ET[shard].nonzero().squeeze(1)
            if len(rows_N) > self._room[shard]:
                self._overflowed, rows_N = True, rows_N[: self._room[shard]]
            request = wire.counted(self._requests_B[shard], len(rows_N))
            request.gather(rows_N, x_TD, expert_ids_TK, gates_TK)
            transfers.append(self._group.send(request.bytes_B, rank))
            visitors.append(rows_N)
        return _Visits(self, transfers, visitors)

    def combine(self, transfers: list[Transfer], visitors: list[Tensor]) -> Tensor:
        """What the shards return for their visitors, added up; zero is theirs whom a row did not visit."""
        replies: list[tuple[Tensor, Tensor, Tensor]] = []
        for shard, (rank, rows_N) in enumerate(zip(self._ranks, visitors, strict=True)):
            sums_TSD = self._sums_TSD[shard]
            if len(rows_N) < len(sums_TSD):
                sums_TSD.zero_()
            if len(rows_N):
                reply_NSD = self._transport.wire.reply(self._replies_B[shard], len(rows_N), sums_TSD.shape[1])
                transfers.append(self._group.recv(reply_NSD.view(-1).view(torch.uint8), rank))
                replies.append((sums_TSD, rows_N, reply_NSD))
        wait_for(transfers, self._transport.deadline_s)
        for sums_TSD, rows_N, reply_NSD in replies:
            sums_TSD.index_copy_(0, rows_N, reply_NSD)
        return self._sum.add()

    def idle(self, layer: int) -> None:
        """The shards know from the header that nothing comes from here."""

    def carried_all(self) -> bool:
        """See WorkerEnd."""
        self._full, self._overflowed = self._overflowed, False
        return not self._full


@dataclass(frozen=True, slots=True)
class _Visits:
    end: _WorkerEnd
    transfers: list[Transfer]
    visitors: list[Tensor]

    def combine(self) -> Tensor:
        return self.end.combine(self.transfers, self.visitors)


class _ShardEnd:
    """Receives the visitors of every worker, and answers each worker that has any."""

    def __init__(self, peers: Peers, experts: Experts, transport: Transport) -> None:
        size, layout = transport.wire.counted_bytes(transport.max_pass_rows), peers.layout_of(transport.wire.leaves)
        self._transport, self._group = transport, peers.join(transport.largest(layout))
        self._workers = [(seat, rank, transport.buffer(size)) for seat, rank in sorted(peers.workers.items())]
        self._batch = ShardBatch(experts, transport, len(self._workers), len(layout.subtrees(peers.seat)))

    def begin(self, step_pass: Pass) -> None:
        """See ShardEnd."""
        self._transport.check(step_pass)
        wire = self._transport.wire
        self._callers = [
            (rank, buffer_B[: wire.counted_bytes(rows)], buffer_B)
            for seat, rank, buffer_B in self._workers
            if (rows := step_pass.rows(seat))
        ]

    def serve(self, layer: int) -> None:
        """See ShardEnd."""
        deadline = time.monotonic() + self._transport.deadline_s
        transfers = [self._group.recv(room_B, rank) for rank, room_B, _ in self._callers]
        wait_for(transfers, deadline - time.monotonic())
        requests = [self._transport.wire.arrived(buffer_B) for _, _, buffer_B in self._callers]
        self._batch.begin([request for request in requests if request.rows])
        self._batch.take_all()
        self._batch.run(layer)
        visited = [rank for (rank, _, _), request in zip(self._callers, requests, strict=True) if request.rows]
        replies = zip(self._batch.replies_B, visited, strict=True)
        wait_for([self._group.send(reply_B, rank) for reply_B, rank in replies], self._transport.deadline_s)
