"""The SwiGLU product (Shazeer 2020, arXiv 2002.05202).

Shapes: T tokens, I inner width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(gate_up_TI2: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` [T, I] of ``[gate | up]`` [T, 2 I]."""
    gate_TI, up_TI = gate_up_TI2.chunk(2, dim=-1)
    return silu(gate_TI) * up_TI
