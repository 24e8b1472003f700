"""The memory plan of packed weights against the tensors that are held."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.linear.layout import PackedMatrix
from divisi.kernels.native.variants import runnable_variants
from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint, rank_tensors
from divisi.model.config import ModelConfig
from divisi.model.demo import checkpoint_dir
from divisi.model.experts import ExpertBank
from divisi.model.footprint.packing import matrices_of_a_token, packing_bytes
from divisi.model.placement import Role, whole_share
from divisi.model.weights import load_weights

pytestmark = pytest.mark.skipif(
    not any(variant.bf16 for variant in runnable_variants()), reason="the processor has no dot products of bf16"
)
CPU = torch.device("cpu")
SMALL = (".A_log", ".dt_bias", "norm.weight", "conv1d.weight", "norm_embedding.weight", "norm_hidden.weight")


def held(part: object, seen: set[int]) -> int:
    """Bytes of the bf16 tensors in dataclasses and tuples, each counted once."""
    if isinstance(part, PackedMatrix):
        part = part.data
    if isinstance(part, Tensor):
        counts = part.dtype is torch.bfloat16 and part.data_ptr() not in seen
        seen.add(part.data_ptr())
        return part.nbytes if counts else 0
    if is_dataclass(part):
        part = tuple(getattr(part, field.name) for field in fields(part))
    return sum(held(entry, seen) for entry in part) if isinstance(part, tuple) else 0


@pytest.mark.parametrize("mtp", [False, True])
def test_what_is_planned_is_what_is_held(mtp: bool) -> None:
    path: Path = checkpoint_dir()
    config, checkpoint, kernels = ModelConfig.load(path).with_mtp(mtp), Checkpoint.open(path), select_kernels(CPU)
    weights = load_weights(checkpoint, config, kernels, torch.bfloat16, CPU)
    experts = ExpertBank.load(checkpoint, config, whole_share(config), kernels, torch.bfloat16, CPU)
    (role,) = Role.all_of(config, 1, 0)
    share = rank_tensors(config, checkpoint.tensors, role)
    matrices = sum(size for name, size in share.items() if not name.endswith(SMALL))
    assert held(weights, set()) + experts.nbytes == matrices + packing_bytes(config, role)


def test_what_a_token_passes_through() -> None:
    """All matrices but the embedding, the head and the experts that it does not take."""
    config, checkpoint = ModelConfig.load(checkpoint_dir()).with_mtp(False), Checkpoint.open(checkpoint_dir())
    (role,) = Role.all_of(config, 1, 0)
    share = rank_tensors(config, checkpoint.tensors, role)
    matrices = sum(size for name, size in share.items() if not name.endswith((*SMALL, "embed_tokens.weight")))
    idle = (config.num_experts - config.num_experts_per_tok) * 3 * config.moe_intermediate_size * config.hidden_size
    assert matrices_of_a_token(config) == matrices // 2 - idle * len(config.moe_layers)
