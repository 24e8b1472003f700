"""From the last norm to logits. Shapes: R rows, D model width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.linear.layout import Matrix
from divisi.kernels.select import Kernels


def logits(kernels: Kernels, final_RD: Tensor, head_VD: Matrix) -> Tensor:
    """Return ``logits_RV``, fp32."""
    found_RV = kernels.linear(final_RD, head_VD)
    if found_RV.dtype is torch.float32:
        return found_RV
    return kernels.memory.empty(found_RV.shape, torch.float32, found_RV.device).copy_(found_RV)
