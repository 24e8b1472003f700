"""How a weight matrix lies in memory: row by row, or packed for the processor's bf16 dot products.

Shapes: E matrices of a stack, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16
BLOCKS = 4


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A bf16 matrix [N, K], or a stack of E alike, in the order of native/bf16.h: what `pack_linear` makes of it."""

    data: Tensor
    """bf16, flat; of a stack [E, values of one matrix]."""
    outputs: int
    """N."""
    inputs: int
    """K."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes held, with the zeros that fill up blocks and pairs."""
        return self.data.nbytes

    def rows(self, indices_T: Tensor) -> Tensor:
        """Some rows [T, K], unpacked; for an embedding that is the head's matrix too."""
        pairs, blocks = -(-self.inputs // 2), -(-self.outputs // LANES)
        block_T, lane_T = indices_T // LANES, indices_T % LANES
        width_T = (blocks - block_T // BLOCKS * BLOCKS).clamp(max=BLOCKS)  # blocks of the panel
        first_T = block_T // BLOCKS * (BLOCKS * LANES * pairs) + block_T % BLOCKS * LANES + lane_T
        at_TP = first_T[:, None] + torch.arange(pairs, device=indices_T.device) * (width_T * LANES)[:, None]
        return self.data.view(torch.int32)[at_TP].view(self.data.dtype)[:, : self.inputs]


Matrix = Tensor | PackedMatrix
"""A weight as an implementation of `linear` takes it."""


def packed_values(outputs: int, inputs: int) -> int:
    """Values that a packed matrix holds."""
    return -(-outputs // LANES) * LANES * 2 * -(-inputs // 2)
