"""Rotary angles: what torch's vectorised cosine and sine give a position may not depend on the positions beside it."""

from __future__ import annotations

import pytest
import torch

from divisi.model.config import ModelConfig
from divisi.model.layers.rotary import Rotary
from divisi.model.random_checkpoint import SMALL_CONFIG


@pytest.mark.parametrize("rotary_dim", [2, 6, 8, 64])
def test_angles_depend_on_the_position_alone(rotary_dim: int) -> None:
    config = ModelConfig.from_hf(SMALL_CONFIG | {"head_dim": 64, "partial_rotary_factor": rotary_dim / 64})
    rotary = Rotary(config, torch.device("cpu"))
    torch.manual_seed(rotary_dim)
    positions = torch.cat([torch.arange(40), torch.randint(0, 262144, (260,))]).int()
    alone = torch.cat([rotary.cos_sin(positions[row : row + 1]) for row in range(300)])
    for count in (*range(1, 71), 128, 300):
        for rows in (slice(0, count), slice(300 - count, 300)):
            assert torch.equal(rotary.cos_sin(positions[rows]), alone[rows]), f"{count} rows"
