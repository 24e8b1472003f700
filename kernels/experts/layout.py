"""In which order a token's experts are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """A binary tree over leaves, to which the model's experts are dealt, and the leaves of the experts held (E)."""

    leaves_E: Tensor
    """int32, on the experts' device."""
    size: int
    """Leaves, a power of two."""

    @classmethod
    def of(cls, expert_ids: Sequence[int], leaves: int, device: torch.device | None = None) -> Self:
        """Of a model whose expert `e` is dealt to leaf `e % leaves`, for the experts of these ids."""
        leaves_E = torch.tensor([e % leaves for e in expert_ids], dtype=torch.int32, device=device)
        return cls(leaves_E, 1 << (leaves - 1).bit_length())
