"""Rotary position angles (Su et al. 2021, arXiv 2104.09864), computed once a step for all layers.

Shapes: T rows, R rotary dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.model.config import ModelConfig


class Rotary:
    """The rotation frequencies of a model."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
        self._inverse_frequency = 1.0 / config.rope_theta ** (steps / config.rotary_dim)

    def cos_sin(self, positions_T: Tensor) -> Tensor:
        """Return ``[T, R]``: R/2 cosines, then R/2 sines, fp32."""
        angles = positions_T.float()[:, None] * self._inverse_frequency
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
