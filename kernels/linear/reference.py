"""Matrix product with a weight stored row by row, and rows of such a weight.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear as torch_linear


def linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return ``x_TK @ weight_NK.T`` in the dtype of ``x``; the product runs in the weight's dtype."""
    return torch_linear(x_TK.to(weight_NK.dtype), weight_NK).to(x_TK.dtype)


def embed(weight_NK: Tensor, rows_T: Tensor) -> Tensor:
    """Return some rows [T, K] (indices int64), in the weight's dtype or in fp32."""
    return weight_NK[rows_T]
