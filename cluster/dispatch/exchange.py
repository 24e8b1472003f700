"""The expert shard's end of broadcast dispatch: tokens of all workers in, partial sums out.

Shapes: T tokens of all active workers, D model width, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from divisi.cluster.dispatch.groups import PeerGroup
from divisi.cluster.dispatch.wire import WireFormat


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
    """Receives one layer's tokens from every worker that has any, and answers each with its rows of the sum."""

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
