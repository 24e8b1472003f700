"""A dispatch mode of one's own, outside `cluster/dispatch/`: three fp32 messages to each shard and layer, no buffers.

It shows what a mode has to bring, and goes through the suite that all modes go through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import wait_for
from divisi.cluster.dispatch.protocol import Experts, Peers, ShardEnd, WorkerEnd
from divisi.cluster.dispatch.transport.groups import PeerGroup, Transfer
from divisi.cluster.passes import Pass
from divisi.model.placement import additions


@dataclass(frozen=True)
class Plain:
    """For any gang with shards on ranks of their own."""

    hidden_size: int
    experts_per_token: int
    deadline_s: float
    leaves: int

    def worker_end(self, peers: Peers) -> WorkerEnd:
        return _WorkerEnd(self, peers, peers.join(2**20))

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        return _ShardEnd(self, peers, peers.join(2**20), experts)


class _WorkerEnd:
    def __init__(self, mode: Plain, peers: Peers, group: PeerGroup) -> None:
        self._mode, self._shards, self._group = mode, sorted(peers.shards.items()), group
        layout = peers.layout_of(mode.leaves)
        self._trees = [layout.subtrees(seat) for seat, _ in self._shards]

    def begin(self, step_pass: Pass) -> None:
        pass

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _Pending:
        tensors = [x_TD.float(), expert_ids_TK, gates_TK]
        sums_TSD = [torch.empty(len(x_TD), len(trees), x_TD.shape[1]) for trees in self._trees]
        transfers = [self._group.send(_bytes(tensor), rank) for _, rank in self._shards for tensor in tensors]
        for (_, rank), of_shard_TSD in zip(self._shards, sums_TSD, strict=True):
            transfers.append(self._group.recv(_bytes(of_shard_TSD), rank))
        return _Pending(transfers, tensors, sums_TSD, [tree for own in self._trees for tree in own], self._mode)

    def idle(self, layer: int) -> None:
        pass

    def carried_all(self) -> bool:
        return True


@dataclass(frozen=True)
class _Pending:
    transfers: Sequence[Transfer]
    sent: Sequence[Tensor]
    sums_TSD: Sequence[Tensor]
    trees: Sequence[range]
    mode: Plain

    def combine(self) -> Tensor:
        wait_for(self.transfers, self.mode.deadline_s)
        as_they_come = zip(self.trees, torch.cat(list(self.sums_TSD), dim=1).unbind(1), strict=True)
        trees, in_order = zip(*sorted(as_they_come, key=lambda pair: pair[0].start), strict=True)
        sums_TD = list(in_order)
        for left, right in additions(trees):
            sums_TD[left] = sums_TD[left] + sums_TD[right]
        return sums_TD[0]


class _ShardEnd:
    def __init__(self, mode: Plain, peers: Peers, group: PeerGroup, experts: Experts) -> None:
        self._mode, self._workers, self._group, self._experts = mode, peers.workers, group, experts

    def begin(self, step_pass: Pass) -> None:
        self._counts = {rank: rows for seat, rank in self._workers.items() if (rows := step_pass.rows(seat))}

    def serve(self, layer: int) -> None:
        for rank, rows in self._counts.items():
            x_TD = torch.empty(rows, self._mode.hidden_size)
            ids_TK = torch.empty(rows, self._mode.experts_per_token, dtype=torch.int32)
            gates_TK = torch.empty(rows, self._mode.experts_per_token)
            transfers = [self._group.recv(_bytes(tensor), rank) for tensor in (x_TD, ids_TK, gates_TK)]
            wait_for(transfers, self._mode.deadline_s)
            y_TD = self._experts.partial_sum(layer, x_TD, ids_TK, gates_TK)
            wait_for([self._group.send(_bytes(y_TD), rank)], self._mode.deadline_s)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
