"""Broadcast dispatch, both ends: every shard gets all tokens of all workers and returns one partial sum to each.

Shapes: T tokens (on a shard, of all active workers), D model width, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.groups import PeerGroup, Transfer
from divisi.cluster.dispatch.wire import WireFormat


class BroadcastDispatcher:
    """The attention worker's end: one message to and one from each shard per layer, in buffers made once per epoch.

    One layer is under way at a time. Partial sums are added in shard order, in fp32, so that the result does not
    depend on which shard is faster.
    """

    def __init__(
        self,
        group: PeerGroup,
        shard_ranks: range,
        wire: WireFormat,
        max_tokens: int,
        deadline_s: float,
        device: torch.device,
    ) -> None:
        self._group = group
        self._shard_ranks = shard_ranks
        self._wire = wire
        self._deadline_s = deadline_s
        self._request_B = torch.empty(wire.request_bytes(max_tokens), dtype=torch.uint8, device=device)
        self._replies_B = [
            torch.empty(wire.reply_bytes(max_tokens), dtype=torch.uint8, device=device) for _ in shard_ranks
        ]

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _BroadcastPending:
        """See `divisi.model.dispatcher.Dispatcher`. Raises StepAborted."""
        num_tokens = x_TD.shape[0]
        request_B = self._wire.write_request(self._request_B, x_TD, expert_ids_TK, gates_TK)
        sends = [self._group.send(request_B, rank) for rank in self._shard_ranks]
        reply_bytes = self._wire.reply_bytes(num_tokens)
        replies = [
            self._group.recv(reply_B[:reply_bytes], rank)
            for reply_B, rank in zip(self._replies_B, self._shard_ranks, strict=True)
        ]
        partials_TD = [self._wire.reply_view(reply_B, num_tokens) for reply_B in self._replies_B]
        return _BroadcastPending(sends, replies, partials_TD, self._deadline_s)


@dataclass(frozen=True, slots=True)
class _BroadcastPending:
    sends: list[Transfer]
    replies: list[Transfer]
    partials_TD: list[Tensor]
    deadline_s: float

    def combine(self) -> Tensor:
        deadline = time.monotonic() + self.deadline_s
        for transfer in (*self.sends, *self.replies):
            transfer.wait(deadline)
        return add_in_shard_order(self.partials_TD)


def add_in_shard_order(partials_TD: Sequence[Tensor]) -> Tensor:
    """The sum of the shards' partial sums, in fp32 and in a new tensor."""
    y_TD = partials_TD[0].to(torch.float32, copy=True)
    for partial_TD in partials_TD[1:]:
        y_TD += partial_TD
    return y_TD


class TokenBatch:
    """The messages of several workers as one batch for the experts, in buffers that are made once per epoch."""

    def __init__(self, wire: WireFormat, max_tokens: int, device: torch.device, compute_dtype: torch.dtype) -> None:
        """`max_tokens` of all workers; `compute_dtype` is what the experts take their input in."""
        self._wire = wire
        self._ids_TK = torch.empty(max_tokens, wire.experts_per_token, dtype=torch.int32, device=device)
        self._gates_TK = torch.empty(max_tokens, wire.experts_per_token, dtype=torch.float32, device=device)
        self._x_TD = torch.empty(max_tokens, wire.hidden_size, dtype=compute_dtype, device=device)

    def gather(self, messages: Iterable[tuple[int, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """``x_TD``, ``ids_TK``, ``gates_TK`` of messages given with their token counts; valid until the next call."""
        start = 0
        for count, message_B in messages:
            ids_TK, gates_TK, x_TD = self._wire.request_views(message_B, count)
            self._ids_TK[start : start + count].copy_(ids_TK)
            self._gates_TK[start : start + count].copy_(gates_TK)
            self._x_TD[start : start + count].copy_(x_TD)
            start += count
        return self._x_TD[:start], self._ids_TK[:start], self._gates_TK[:start]


class ShardExchange:
    """The expert shard's end: receives a layer's tokens of every worker, and answers each with its rows of the sum."""

    def __init__(
        self,
        group: PeerGroup,
        worker_ranks: range,
        wire: WireFormat,
        max_tokens: int,
        deadline_s: float,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        """`max_tokens` is per worker; `compute_dtype` is what the experts take their input in."""
        self._group = group
        self._worker_ranks = worker_ranks
        self._wire = wire
        self._deadline_s = deadline_s
        self._requests_B = [
            torch.empty(wire.request_bytes(max_tokens), dtype=torch.uint8, device=device) for _ in worker_ranks
        ]
        total = max_tokens * len(worker_ranks)
        self._reply_B = torch.empty(wire.reply_bytes(total), dtype=torch.uint8, device=device)
        self._batch = TokenBatch(wire, total, device, compute_dtype)

    def receive(self, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """``x_TD``, ``ids_TK`` and ``gates_TK`` of all workers, in rank order. Raises StepAborted.

        `counts` are the step's tokens per worker. The tensors are valid until the next call.
        """
        deadline = time.monotonic() + self._deadline_s
        transfers = [
            (count, request_B, self._group.recv(request_B[: self._wire.request_bytes(count)], rank))
            for count, request_B, rank in zip(counts, self._requests_B, self._worker_ranks, strict=True)
            if count
        ]

        def arrived() -> Iterator[tuple[int, Tensor]]:
            for count, request_B, transfer in transfers:
                transfer.wait(deadline)
                yield count, request_B

        return self._batch.gather(arrived())

    def reply(self, counts: Sequence[int], y_TD: Tensor) -> None:
        """Send every active worker its rows of the partial sums. Raises StepAborted."""
        deadline = time.monotonic() + self._deadline_s
        self._wire.reply_view(self._reply_B, y_TD.shape[0]).copy_(y_TD)
        transfers = []
        start = 0
        for count, rank in zip(counts, self._worker_ranks, strict=True):
            if count:
                first, last = self._wire.reply_bytes(start), self._wire.reply_bytes(start + count)
                transfers.append(self._group.send(self._reply_B[first:last], rank))
                start += count
        for transfer in transfers:
            transfer.wait(deadline)
