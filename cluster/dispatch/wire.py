"""What a layer's rows look like on the wire, both ways, and what bounds them.

To a shard, in one message: ``[ids int32 TK | gates fp32 TK | x TD in the wire dtype]``, for all-to-all behind the
number of rows; back: ``y TSD`` in fp32. Neither way rounds: x travels in what the experts take, and sums as they are.
Shapes: T rows, D model width, K experts per row, S subtrees that a shard sums (one where it serves leaves of an aligned
power of two), B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from divisi.cluster.errors import StepAborted
from divisi.cluster.passes import Pass
from divisi.model.placement import Layout

_COUNT = 8  # bytes in front of a message that says how many rows it holds


@dataclass(frozen=True, slots=True)
class WireFormat:
    """Sizes and views of messages for one model."""

    hidden_size: int
    experts_per_token: int
    dtype: torch.dtype
    """How activations travel to the experts: in what these take."""
    leaves: int
    """Virtual shards of the model: of the tree in which a row's experts are summed."""

    def request_bytes(self, rows: int) -> int:
        """Size of a message to a shard."""
        return rows * (8 * self.experts_per_token + self.hidden_size * self.dtype.itemsize)

    def counted_bytes(self, rows: int) -> int:
        """Size of a message that says itself how many rows it holds."""
        return _COUNT + self.request_bytes(rows)

    def counted(self, buffer_B: Tensor, rows: int) -> ShardRequest:
        """A message that says how many rows it holds, at the beginning of a buffer."""
        buffer_B[:4].view(torch.int32).fill_(rows)
        rest = self.request(buffer_B[_COUNT:], rows)
        return ShardRequest(buffer_B[: self.counted_bytes(rows)], rest.x_TD, rest.ids_TK, rest.gates_TK)

    def arrived(self, buffer_B: Tensor) -> ShardRequest:
        """The message that came with its count, at the beginning of a buffer. Raises StepAborted."""
        rows = int(buffer_B[:4].view(torch.int32).item())
        if rows < 0 or self.counted_bytes(rows) > len(buffer_B):
            raise StepAborted(f"a message claims {rows} rows, more than there is room for")
        return self.request(buffer_B[_COUNT:], rows)

    def reply_bytes(self, rows: int, sums: int) -> int:
        """Size of the reply of a shard that serves so many subtrees."""
        return rows * sums * self.hidden_size * 4

    def request(self, buffer_B: Tensor, rows: int) -> ShardRequest:
        """A message to a shard, laid out at the beginning of a buffer."""
        pairs = rows * self.experts_per_token
        bytes_B = buffer_B[: self.request_bytes(rows)]
        ids_TK = bytes_B[: 4 * pairs].view(torch.int32).view(rows, self.experts_per_token)
        gates_TK = bytes_B[4 * pairs : 8 * pairs].view(torch.float32).view(rows, self.experts_per_token)
        x_TD = bytes_B[8 * pairs :].view(self.dtype).view(rows, self.hidden_size)
        return ShardRequest(bytes_B, x_TD, ids_TK, gates_TK)

    def reply(self, buffer_B: Tensor, rows: int, sums: int) -> Tensor:
        """``y_TSD`` of a shard's reply, at the beginning of a buffer."""
        return buffer_B[: self.reply_bytes(rows, sums)].view(torch.float32).view(rows, sums, self.hidden_size)


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """A worker's rows of one layer, on their way to a shard: views of one buffer."""

    bytes_B: Tensor
    x_TD: Tensor
    ids_TK: Tensor
    gates_TK: Tensor

    @property
    def rows(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def write(self, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> None:
        """Fill it."""
        assert x_TD.shape[0] == self.rows, "the header says how many rows a worker brings to a pass"
        self.ids_TK.copy_(expert_ids_TK)
        self.gates_TK.copy_(gates_TK)
        self.x_TD.copy_(x_TD)

    def gather(self, rows_N: Tensor, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> None:
        """Fill it with some of a worker's rows."""
        torch.index_select(expert_ids_TK, 0, rows_N, out=self.ids_TK)
        torch.index_select(gates_TK, 0, rows_N, out=self.gates_TK)
        self.x_TD.copy_(x_TD[rows_N])


@dataclass(frozen=True, slots=True)
class Transport:
    """How the ranks of a gang send rows to each other, and the bounds that their buffers are made for."""

    wire: WireFormat
    max_pass_rows: int
    """Most rows that one worker brings to a pass."""
    deadline_s: float
    """How long a peer may take for a layer."""
    device: torch.device
    compute_dtype: torch.dtype
    """What the experts take their input in."""

    def largest(self, layout: Layout) -> int:
        """Bytes of the longest message in an epoch of such a layout."""
        most = max(len(layout.subtrees(seat)) for seat in layout.seats)
        return max(self.wire.counted_bytes(self.max_pass_rows), self.wire.reply_bytes(self.max_pass_rows, most))

    def check(self, step_pass: Pass) -> None:
        """Raise StepAborted for a pass that the buffers are not made for: its leader has other limits."""
        if (rows := max(step_pass.counts.values(), default=0)) > self.max_pass_rows:
            raise StepAborted(f"a pass has {rows} rows of one worker, and room is for {self.max_pass_rows}")

    def buffer(self, size: int) -> Tensor:
        """Room for so many bytes of messages."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)
