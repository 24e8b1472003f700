"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467).

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """Return ``x / rms(x) * scale`` in the dtype of ``x``; the arithmetic is fp32.

    ``scale_D`` is the whole factor: a zero-centred checkpoint weight w is passed as 1 + w.
    """
    x_fp32 = x_TD.float()
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps) * scale_D).to(x_TD.dtype)


def add_rms_norm(residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """Add ``update`` to ``residual`` in place, then return the norm of the sum."""
    residual_TD.add_(update_TD)
    return rms_norm(residual_TD, scale_D, eps)
