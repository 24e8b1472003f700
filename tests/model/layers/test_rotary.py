"""Rotary angles: the table holds the cosine and sine of each position, and gives a row nothing of those beside it."""

from __future__ import annotations

import pytest
import torch

from divisi.model.config import ModelConfig
from divisi.model.layers.rotary import Rotary
from divisi.model.random_checkpoint import SMALL_CONFIG

POSITIONS = 4096


@pytest.mark.parametrize("rotary_dim", [2, 6, 8, 64])
def test_angles_depend_on_the_position_alone(rotary_dim: int) -> None:
    config = ModelConfig.from_hf(SMALL_CONFIG | {"head_dim": 64, "partial_rotary_factor": rotary_dim / 64})
    rotary = Rotary(config, POSITIONS, torch.device("cpu"))
    torch.manual_seed(rotary_dim)
    positions = torch.cat([torch.arange(40), torch.randint(0, POSITIONS, (260,))])
    steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32)
    angles = (positions[:, None].float() / config.rope_theta ** (steps / rotary_dim)).double()
    want = torch.cat([angles.cos(), angles.sin()], dim=-1)
    alone = torch.cat([rotary.cos_sin(positions[row : row + 1], torch.empty(1, rotary_dim)) for row in range(300)])
    torch.testing.assert_close(alone.double(), want, rtol=0.0, atol=1e-3)  # an angle near 4,096 is exact to 2.4e-4
    for count in (1, 7, 64, 300):
        got = rotary.cos_sin(positions[-count:], torch.empty(count, rotary_dim))
        assert torch.equal(got, alone[-count:]), f"{count} rows"
