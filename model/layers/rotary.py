"""Rotary position angles (Su et al. 2021, arXiv 2104.09864), computed once for all positions.

Shapes: T rows, P positions, R rotary dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.model.config import ModelConfig


class Rotary:
    """The rotations of a model's first positions."""

    def __init__(self, config: ModelConfig, num_positions: int, device: torch.device) -> None:
        steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=device)
        inverse_frequency = 1.0 / config.rope_theta ** (steps / config.rotary_dim)
        angles = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None] * inverse_frequency
        self.cos_sin_PR = torch.cat([angles.cos(), angles.sin()], dim=-1)
        """Of all of them: R/2 cosines, then R/2 sines, fp32."""

    def cos_sin(self, positions_T: Tensor, out_TR: Tensor) -> Tensor:
        """Fill and return ``out_TR``: R/2 cosines, then R/2 sines, fp32."""
        return torch.index_select(self.cos_sin_PR, 0, positions_T, out=out_TR)
