"""The vendor's own product, into memory that is there already. Shapes: as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.linear.layout import Matrix, plain_rows
from divisi.kernels.pass_memory import Memory


def linear(x_TK: Tensor, weight_NK: Matrix, *, memory: Memory) -> Tensor:
    """See reference.py."""
    rows_NK = plain_rows(weight_NK)
    y_TN = memory.empty((x_TK.shape[0], rows_NK.shape[0]), rows_NK.dtype, x_TK.device)
    torch.mm(x_TK.to(rows_NK.dtype), rows_NK.t(), out=y_TN)
    return y_TN.to(x_TK.dtype)


def embed(weight_NK: Matrix, rows_T: Tensor, *, memory: Memory) -> Tensor:
    """See reference.py."""
    rows_NK = plain_rows(weight_NK)
    y_TK = memory.empty((rows_T.shape[0], rows_NK.shape[1]), rows_NK.dtype, rows_NK.device)
    return torch.index_select(rows_NK, 0, rows_T, out=y_TK)
