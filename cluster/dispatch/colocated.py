"""Dispatch among ranks that are attention worker and expert shard at once.

In a layer, a rank sends its tokens to all peers, runs its own experts on the tokens of all, sends every peer its rows
of the partial sum, and adds the partial sums of all shards for its own tokens. A rank without tokens serves its experts
all the same. All know from the step's header who has how many.

The batch of the experts, the wire's rounding and the order of summation are those of broadcast dispatch to as many
shards, and so are the results, bit for bit.

Shapes: T tokens, D model width, K experts per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import TokenBatch, add_in_shard_order
from divisi.cluster.dispatch.groups import PeerGroup, Transfer
from divisi.cluster.dispatch.local import Experts
from divisi.cluster.dispatch.wire import WireFormat


class ColocatedDispatcher:
    """One rank's end, both ways. `begin_step` comes before each step's layers, of which one is under way at a time."""

    def __init__(
        self,
        group: PeerGroup,
        rank: int,
        num_ranks: int,
        experts: Experts,
        wire: WireFormat,
        max_tokens: int,
        deadline_s: float,
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        """`max_tokens` is per rank; `compute_dtype` is what the experts take their input in."""
        self._group, self._rank, self._experts = group, rank, experts
        self._wire, self._deadline_s = wire, deadline_s

        def buffers(size: int) -> list[Tensor]:
            return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_ranks)]

        self._requests_B = buffers(wire.request_bytes(max_tokens))  # by rank, this one's own among them
        self._replies_B = buffers(wire.reply_bytes(max_tokens))
        self._partial_B = torch.empty(wire.reply_bytes(num_ranks * max_tokens), dtype=torch.uint8, device=device)
        self._batch = TokenBatch(wire, num_ranks * max_tokens, device, compute_dtype)
        self._counts: Sequence[int] = (0,) * num_ranks

    def begin_step(self, counts: Sequence[int]) -> None:
        """The tokens that each rank brings to the next step."""
        self._counts = counts

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _ColocatedPending:
        """See `divisi.model.dispatcher.Dispatcher`. Raises StepAborted."""
        assert x_TD.shape[0] == self._counts[self._rank], "the header says how many tokens a rank brings"
        self._wire.write_request(self._requests_B[self._rank], x_TD, expert_ids_TK, gates_TK)
        return _ColocatedPending(self, layer, self._exchange_requests())

    def serve(self, layer: int) -> None:
        """Run this rank's experts for the peers, in a step to which it brings no tokens. Raises StepAborted."""
        self.finish(layer, self._exchange_requests())

    def finish(self, layer: int, requests: Sequence[Transfer]) -> list[Tensor]:
        """The other half of a layer: the partial sums for this rank's tokens, in shard order."""
        deadline = time.monotonic() + self._deadline_s
        for transfer in requests:
            transfer.wait(deadline)
        messages = zip(self._counts, self._requests_B, strict=True)
        partial_TD = self._experts.partial_sum(layer, *self._batch.gather(messages))
        self._wire.reply_view(self._partial_B, partial_TD.shape[0]).copy_(partial_TD)
        deadline = time.monotonic() + self._deadline_s  # anew: a peer may take as long for its experts as this one did
        for transfer in self._exchange_replies():
            transfer.wait(deadline)
        own = self._counts[self._rank]
        return [self._wire.reply_view(reply_B, own) for reply_B in self._replies_B]

    def _exchange_requests(self) -> list[Transfer]:
        own = self._requests_B[self._rank][: self._wire.request_bytes(self._counts[self._rank])]
        sizes = [self._wire.request_bytes(count) for count in self._counts]
        return self._exchange(
            [own] * len(sizes), [buffer_B[:size] for buffer_B, size in zip(self._requests_B, sizes, strict=True)]
        )

    def _exchange_replies(self) -> list[Transfer]:
        sizes = [self._wire.reply_bytes(count) for count in self._counts]
        rows = list(self._partial_B[: sum(sizes)].split(sizes))
        own = sizes[self._rank]
        self._replies_B[self._rank][:own].copy_(rows[self._rank])
        return self._exchange(rows, [reply_B[:own] for reply_B in self._replies_B])

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> list[Transfer]:
        """Start one transfer each way with every peer, skipping the empty ones.

        Of two ranks the lower one sends first and the higher one receives first, so that both issue their transfers in
        the same order, which a backend that carries them out one after another (NCCL) needs.
        """
        transfers = []
        for peer, (out_B, in_B) in enumerate(zip(outgoing, incoming, strict=True)):
            if peer == self._rank:
                continue
            for sending in (self._rank < peer, self._rank > peer):
                if sending and out_B.numel():
                    transfers.append(self._group.send(out_B, peer))
                elif not sending and in_B.numel():
                    transfers.append(self._group.recv(in_B, peer))
        return transfers


@dataclass(frozen=True, slots=True)
class _ColocatedPending:
    dispatcher: ColocatedDispatcher
    layer: int
    requests: list[Transfer]

    def combine(self) -> Tensor:
        return add_in_shard_order(self.dispatcher.finish(self.layer, self.requests))
