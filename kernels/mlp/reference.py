"""A dense SwiGLU layer (Shazeer 2020, arXiv 2002.05202): two products and what is between them.

Shapes: T tokens, D model width, I inner width, F = 2 I.
"""

from __future__ import annotations

from torch import Tensor

from divisi.kernels.activation.reference import silu_mul
from divisi.kernels.linear.reference import linear


def mlp(x_TD: Tensor, gate_up_FD: Tensor, down_DI: Tensor) -> Tensor:
    """Return ``down (silu(gate x) * up x)`` [T, D]; ``gate_up_FD`` has the gate's rows first."""
    return linear(silu_mul(linear(x_TD, gate_up_FD)), down_DI)
