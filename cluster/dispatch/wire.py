"""What a layer's tokens look like on the wire, both ways.

To a shard, in one message: ``[ids int32 TK | gates fp32 TK | x TD in the wire dtype]``; back: ``y TD`` in that dtype.
Shapes: T tokens, D model width, K experts per token, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WireFormat:
    """Sizes and views of messages for one model."""

    hidden_size: int
    experts_per_token: int
    dtype: torch.dtype
    """How activations travel: the weights' dtype."""

    def request_bytes(self, num_tokens: int) -> int:
        """Size of a message to a shard."""
        return num_tokens * (8 * self.experts_per_token + self.hidden_size * self.dtype.itemsize)

    def reply_bytes(self, num_tokens: int) -> int:
        """Size of a shard's reply."""
        return num_tokens * self.hidden_size * self.dtype.itemsize

    def request_views(self, message_B: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """``ids_TK``, ``gates_TK`` and ``x_TD`` inside a message to a shard."""
        pairs = num_tokens * self.experts_per_token
        ids_TK = message_B[: 4 * pairs].view(torch.int32).view(num_tokens, self.experts_per_token)
        gates_TK = message_B[4 * pairs : 8 * pairs].view(torch.float32).view(num_tokens, self.experts_per_token)
        x_TD = message_B[8 * pairs : self.request_bytes(num_tokens)].view(self.dtype)
        return ids_TK, gates_TK, x_TD.view(num_tokens, self.hidden_size)

    def write_request(self, message_B: Tensor, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Fill a message to a shard; returns the part of `message_B` that it takes."""
        num_tokens = x_TD.shape[0]
        ids_TK, wire_gates_TK, wire_x_TD = self.request_views(message_B, num_tokens)
        ids_TK.copy_(expert_ids_TK)
        wire_gates_TK.copy_(gates_TK)
        wire_x_TD.copy_(x_TD)
        return message_B[: self.request_bytes(num_tokens)]

    def reply_view(self, message_B: Tensor, num_tokens: int) -> Tensor:
        """``y_TD`` inside a shard's reply."""
        return message_B[: self.reply_bytes(num_tokens)].view(self.dtype).view(num_tokens, self.hidden_size)
