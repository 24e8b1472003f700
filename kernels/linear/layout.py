"""How a weight matrix lies in memory: row by row, or packed for the processor's bf16 dot products.

Shapes: E matrices of a stack, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16


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


Matrix = Tensor | PackedMatrix
"""A weight as an implementation of `linear` takes it."""


def packed_values(outputs: int, inputs: int) -> int:
    """Values that a packed matrix holds."""
    return -(-outputs // LANES) * LANES * 2 * -(-inputs // 2)
