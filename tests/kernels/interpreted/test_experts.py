"""A shard of a GPU whose experts come and go: the bits of one that has held them from the beginning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.checkpoint import Checkpoint
from divisi.model.experts import ExpertBank
from divisi.model.placement import share_of
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

CPU, LEAVES = torch.device("cpu"), 8
TRITON = assembled({"triton": triton_operations(Chip.H100)}, "triton")


@pytest.mark.verify
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_that_come_and_go(dtype: torch.dtype, tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, SMALL_CONFIG | {"num_hidden_layers": 1}, tokenizer=False)
    checkpoint, rng = Checkpoint.open(tmp_path), torch.Generator().manual_seed(4)
    ids_TK = torch.rand(5, config.num_experts, generator=rng).argsort(dim=1)[:, :4].int().contiguous()
    rows = torch.randn(5, config.hidden_size, generator=rng).to(dtype), ids_TK, torch.rand(5, 4, generator=rng)

    def bank_of(leaves: set[int]) -> ExpertBank:
        share = share_of(config.num_experts, LEAVES, leaves)
        return ExpertBank.load(checkpoint, config, share, TRITON, dtype, CPU)

    bank = bank_of({0, 1})
    for leaves in ({0, 1, 2, 3}, {1, 3, 6}):
        bank.hold(checkpoint, config, leaves)
        y_TD = bank.partial_sum(0, *rows)
        assert y_TD.abs().sum() > 0
        assert torch.equal(y_TD, bank_of(leaves).partial_sum(0, *rows))
