"""Sampling on a GPU beside its reference: greedy rows and rows with noise in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.sampling.layout import Draw, Draws
from divisi.kernels.sampling.reference import choose_tokens
from tests.support.honest_interpreter import grid_order

CHOOSE = triton_operations(Chip.H100)["choose_tokens"]
GREEDY, WARM, HOT, LIKELY = Draw(1, 0.0), Draw(2, 0.7), Draw(3, 3.0), Draw(4, 1.0, min_p=0.2)
VOCAB = 9_001
"""Two whole blocks and a part of one."""


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("rows", [[GREEDY], [GREEDY, WARM, HOT, LIKELY, GREEDY]], ids=["greedy", "mixed"])
def test_the_same_tokens(rows: list[Draw], order: str) -> None:
    generator = torch.Generator().manual_seed(len(rows))
    logits_RV = 3 * torch.randn(len(rows), VOCAB, generator=generator)
    positions_R = np.arange(len(rows), dtype=np.int64) + 40
    with grid_order(order):
        found = CHOOSE(logits_RV, Draws(rows), positions_R)
    assert torch.equal(found, choose_tokens(logits_RV, Draws(rows), positions_R))


def test_equals_go_to_the_lower_id_and_forbidden_tokens_never_win() -> None:
    logits_RV = torch.full((4, VOCAB), -torch.inf)
    logits_RV[0, [17, 4_500, 8_999]] = 2.0
    logits_RV[1, [4_500, 8_999]] = torch.tensor([-0.0, 0.0])
    logits_RV[2, 8_000] = -50.0
    logits_RV[3, [3, 8_500]] = -1.0
    draws = Draws([GREEDY, GREEDY, GREEDY, HOT])
    found = CHOOSE(logits_RV, draws, np.zeros(4, dtype=np.int64))
    assert found[:3].tolist() == [17, 4_500, 8_000]
    assert found[3].item() in (3, 8_500)


def test_noise_is_that_of_the_reference() -> None:
    """Over flat logits the token is the noise's alone, whatever its size."""
    logits_RV = torch.zeros(12, 300)
    draws, positions_R = Draws([Draw(seed) for seed in range(12)]), np.arange(12, dtype=np.int64)
    found = CHOOSE(logits_RV, draws, positions_R)
    assert torch.equal(found, choose_tokens(logits_RV, draws, positions_R))
    assert len(set(found.tolist())) > 8


def test_filtered_rows_are_the_references() -> None:
    logits_RV = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    draws, positions_R = Draws([GREEDY, Draw(5, 1.0, top_k=3), Draw(6, 1.0, top_p=0.5)]), np.zeros(3, dtype=np.int64)
    assert torch.equal(CHOOSE(logits_RV, draws, positions_R), choose_tokens(logits_RV, draws, positions_R))
