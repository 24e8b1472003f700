"""RMS norm and initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.Module):
    """RMS norm with a weight centred on zero."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight + 1.0, self.eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.7 * inputs**-0.5)
    return layer


def silent(inputs: int, outputs: int) -> nn.Linear:
    """A projection that adds nothing to the residual stream to begin with: all layers can then tell tokens apart."""
    layer = linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    return layer
