"""How a weight matrix lies in memory: row by row, in a format, or packed for the processor's bf16 dot products.

Shapes: E matrices of a stack, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from divisi.kernels.native.memory import advise_huge_pages

LANES, TILE = 16, 32


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A bf16 matrix [N, K], or a stack of E alike: what `pack_linear` makes of it.

    In the order of native/bf16.h, by the build that packed it: another one does not understand it.
    """

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
        """Bytes held, with the zeros that fill up blocks and tiles."""
        return self.data.nbytes


class Format(Enum):
    """What the values of a stored matrix are."""

    PLAIN = "plain"
    """The weights themselves, bf16 or fp32."""


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix [N, K], or a stack [E, N, K], row by row, as GPUs hold it: what `pack_linear` makes of it there."""

    values: Tensor
    format: Format = Format.PLAIN
    scales: Tensor | None = None
    """What values are multiplied by, in formats that have this."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


Matrix = Tensor | StoredMatrix | PackedMatrix
"""A weight as an implementation of `linear` takes it."""


def plain_rows(matrix: Matrix) -> Tensor:
    """The weights of a matrix that lies row by row. Raises ValueError where its values are in another format."""
    if isinstance(matrix, Tensor):
        return matrix
    if isinstance(matrix, PackedMatrix) or matrix.format is not Format.PLAIN:
        told = "packed" if isinstance(matrix, PackedMatrix) else matrix.format.value
        raise ValueError(f"a kernel that takes weights row by row got a matrix in format {told!r}")
    return matrix.values


def packed_values(outputs: int, inputs: int) -> int:
    """Values that a packed matrix holds."""
    return -(-outputs // LANES) * LANES * -(-inputs // TILE) * TILE


def restacked(stacks: Sequence[Matrix], picks: Sequence[tuple[int, int]]) -> Matrix:
    """The stack of matrices that are each given as one of these stacks, all alike, and the place in it.

    A copy, unless it is one of them as it is.
    """
    first = stacks[0]
    if isinstance(first, Tensor):
        return _picked([stack for stack in stacks if isinstance(stack, Tensor)], picks)
    if isinstance(first, PackedMatrix):
        return replace(first, data=_picked([stack.data for stack in stacks if isinstance(stack, PackedMatrix)], picks))
    stored = [stack for stack in stacks if isinstance(stack, StoredMatrix)]
    scales = [stack.scales for stack in stored if stack.scales is not None]
    values = _picked([stack.values for stack in stored], picks)
    return replace(first, values=values, scales=_picked(scales, picks) if scales else None)


def _picked(stacks: Sequence[Tensor], picks: Sequence[tuple[int, int]]) -> Tensor:
    """One by one: nothing is there a third time."""
    if len(stacks) == 1 and [place for _, place in picks] == list(range(len(stacks[0]))):
        return stacks[0]
    out = advise_huge_pages(stacks[0].new_empty((len(picks), *stacks[0].shape[1:])))
    for target, (stack, place) in zip(out, picks, strict=True):
        target.copy_(stacks[stack][place])
    return out
