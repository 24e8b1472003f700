"""Broadcast dispatch, both ends: every shard gets all rows of all workers and returns its sums to each.

All buffers are made once per epoch, and their views once per pass. One layer is under way at a time.

Shapes: T rows (on a shard, of all workers that bring any), D model width, K experts per row, S subtrees of a shard, B
bytes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.protocol import Experts, Peers, ShardEnd, WorkerEnd
from divisi.cluster.dispatch.transport.groups import Transfer
from divisi.cluster.dispatch.wire import ShardRequest, Transport
from divisi.cluster.passes import Pass
from divisi.model.placement import additions


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The mode of gangs whose experts are on ranks of their own."""

    transport: Transport

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """See DispatchMode."""
        return _WorkerEnd(peers, self.transport)

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        """See ShardedMode."""
        return _ShardEnd(peers, experts, self.transport)


class _WorkerEnd:
    """One message to and one from each shard per layer."""

    def __init__(self, peers: Peers, transport: Transport) -> None:
        wire, max_rows = transport.wire, transport.max_pass_rows
        self._seat, self._transport = peers.seat, transport
        layout = peers.layout_of(wire.leaves)
        self._group = peers.join(transport.largest(layout))
        self._ranks = [peers.shards[seat] for seat in layout.seats]
        self._trees = [layout.subtrees(seat) for seat in layout.seats]
        self._request_B = transport.buffer(wire.request_bytes(max_rows))
        self._replies_B = [transport.buffer(wire.reply_bytes(max_rows, len(trees))) for trees in self._trees]
        self._sum = ShardSum(transport, self._trees)

    def begin(self, step_pass: Pass) -> None:
        self._transport.check(step_pass)
        rows, wire = step_pass.rows(self._seat), self._transport.wire
        self._request = wire.request(self._request_B, rows)
        replies_TSD = [
            wire.reply(reply_B, rows, len(trees)) for reply_B, trees in zip(self._replies_B, self._trees, strict=True)
        ]
        self._incoming_B = [reply_TSD.view(-1).view(torch.uint8) for reply_TSD in replies_TSD]
        self._sum.begin(replies_TSD)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _BroadcastPending:
        self._request.write(x_TD, expert_ids_TK, gates_TK)
        transfers = [self._group.send(self._request.bytes_B, rank) for rank in self._ranks]
        for reply_B, rank in zip(self._incoming_B, self._ranks, strict=True):
            transfers.append(self._group.recv(reply_B, rank))
        return _BroadcastPending(transfers, self._sum, self._transport.deadline_s)

    def idle(self, layer: int) -> None:
        """The shards know from the header that nothing comes from here."""

    def carried_all(self) -> bool:
        """See WorkerEnd."""
        return True


@dataclass(frozen=True, slots=True)
class _BroadcastPending:
    transfers: list[Transfer]
    partials: ShardSum
    deadline_s: float

    def combine(self) -> Tensor:
        wait_for(self.transfers, self.deadline_s)
        return self.partials.add()


class _ShardEnd:
    """Receives a layer's rows of every worker, and answers each with its rows of the partial sums."""

    def __init__(self, peers: Peers, experts: Experts, transport: Transport) -> None:
        size = transport.wire.request_bytes(transport.max_pass_rows)
        layout = peers.layout_of(transport.wire.leaves)
        self._transport, self._group = transport, peers.join(transport.largest(layout))
        self._workers = [(seat, rank, transport.buffer(size)) for seat, rank in sorted(peers.workers.items())]
        self._batch = ShardBatch(experts, transport, len(self._workers), len(layout.subtrees(peers.seat)))

    def begin(self, step_pass: Pass) -> None:
        self._transport.check(step_pass)
        active = [(rank, step_pass.rows(seat), buffer_B) for seat, rank, buffer_B in self._workers]
        self._requests = [
            (rank, self._transport.wire.request(buffer_B, rows)) for rank, rows, buffer_B in active if rows
        ]
        self._batch.begin([request for _, request in self._requests])

    def serve(self, layer: int) -> None:
        deadline = time.monotonic() + self._transport.deadline_s
        transfers = [self._group.recv(request.bytes_B, rank) for rank, request in self._requests]
        for index, transfer in enumerate(transfers):
            transfer.wait(deadline)
            self._batch.take(index)
        self._batch.run(layer)
        replies = zip(self._batch.replies_B, self._requests, strict=True)
        wait_for([self._group.send(reply_B, rank) for reply_B, (rank, _) in replies], self._transport.deadline_s)


def wait_for(transfers: Sequence[Transfer], deadline_s: float) -> None:
    """Wait until all are done, for so long in all. Raises StepAborted."""
    deadline = time.monotonic() + deadline_s
    for transfer in transfers:
        transfer.wait(deadline)


class ShardSum:
    """Adds the shards' sums in the fixed tree, so that it matters neither how many there are nor which is faster."""

    def __init__(self, transport: Transport, trees: Sequence[Sequence[range]]) -> None:
        """`trees` are the subtrees of each shard."""
        shape = transport.max_pass_rows, transport.wire.hidden_size
        self._y_TD = torch.empty(shape, dtype=torch.float32, device=transport.device)
        all_trees = [tree for of_shard in trees for tree in of_shard]
        self._in_order = sorted(range(len(all_trees)), key=lambda index: all_trees[index].start)
        self._additions = additions([all_trees[index] for index in self._in_order])

    def begin(self, replies_TSD: Sequence[Tensor]) -> None:
        """A pass's replies will be found here, in the order of the shards; their memory is added up in."""
        as_they_come_TD = [sum_TD for reply_TSD in replies_TSD for sum_TD in reply_TSD.unbind(1)]
        sums_TD = [as_they_come_TD[index] for index in self._in_order]
        self._pairs = [(sums_TD[left], sums_TD[right]) for left, right in self._additions]
        self._sum_TD = self._y_TD[: replies_TSD[0].shape[0]] if self._pairs else sums_TD[0]

    def add(self) -> Tensor:
        """Their sum, valid until the next call."""
        if self._pairs:
            *first, (left_TD, right_TD) = self._pairs
            for sum_TD, other_TD in first:
                sum_TD += other_TD
            torch.add(left_TD, right_TD, out=self._sum_TD)
        return self._sum_TD


class ShardBatch:
    """The requests of several workers as one batch for the experts of a shard, and the replies."""

    def __init__(self, experts: Experts, transport: Transport, num_workers: int, sums: int) -> None:
        """`sums` is the number of subtrees that the shard serves."""
        wire, device, rows = transport.wire, transport.device, transport.max_pass_rows * num_workers
        self._experts, self._wire, self._sums = experts, wire, sums
        self._ids_TK = torch.empty(rows, wire.experts_per_token, dtype=torch.int32, device=device)
        self._gates_TK = torch.empty(rows, wire.experts_per_token, dtype=torch.float32, device=device)
        self._x_TD = torch.empty(rows, wire.hidden_size, dtype=transport.compute_dtype, device=device)
        self._reply_B = transport.buffer(wire.reply_bytes(rows, sums))

    def begin(self, requests: Sequence[ShardRequest]) -> None:
        """Lay out a pass: the rows of these requests, one after another."""
        self._copies: list[tuple[tuple[Tensor, Tensor], ...]] = []
        self.replies_B: list[Tensor] = []
        """The reply to each request."""
        start = 0
        for request in requests:
            end = start + request.rows
            self._copies.append((
                (self._ids_TK[start:end], request.ids_TK),
                (self._gates_TK[start:end], request.gates_TK),
                (self._x_TD[start:end], request.x_TD),
            ))  # fmt: skip
            first, last = (self._wire.reply_bytes(row, self._sums) for row in (start, end))
            self.replies_B.append(self._reply_B[first:last])
            start = end
        self._batch = self._x_TD[:start], self._ids_TK[:start], self._gates_TK[:start]
        self._y_TD = self._wire.reply(self._reply_B, start, self._sums).flatten(1)

    def take(self, index: int) -> None:
        """A request has arrived, as `requests[index]` of the pass."""
        for target, source in self._copies[index]:
            target.copy_(source)

    def take_all(self) -> None:
        """All requests have arrived."""
        for index in range(len(self._copies)):
            self.take(index)

    def run(self, layer: int) -> None:
        """Fill the replies, once all requests were taken."""
        if self._copies:
            self._y_TD.copy_(self._experts.partial_sum(layer, *self._batch))
