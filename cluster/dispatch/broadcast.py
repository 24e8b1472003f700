"""The attention worker's end of broadcast dispatch: every shard gets all tokens and returns one partial sum.

Shapes: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.groups import PeerGroup, Transfer
from divisi.cluster.dispatch.wire import WireFormat


class BroadcastDispatcher:
    """One message to and one from each shard per layer, in buffers that are made once per epoch.

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
