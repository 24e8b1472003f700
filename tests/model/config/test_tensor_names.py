"""An MTP layer is found by its tensors, read and shared out with the rest, and left alone where it isn't used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from divisi.kernels.select import select_kernels
from divisi.model.checkpoint import Checkpoint, CheckpointError, rank_tensors
from divisi.model.config import ModelConfig
from divisi.model.config.tensor_names import count_mtp_layers
from divisi.model.errors import ConfigError
from divisi.model.experts import ExpertBank
from divisi.model.placement import ExpertShare, Role
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

CPU = torch.device("cpu")
CONFIG = SMALL_CONFIG | {"num_hidden_layers": 2, "full_attention_interval": 2}


def written(path: Path, **options: object) -> Path:
    write_random_checkpoint(path, CONFIG, seed=1, tokenizer=False, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("options", [{}, {"mtp_layout": "packed"}, {"max_file_bytes": 100_000}], ids=str)
def test_it_is_found_in_any_layout(tmp_path: Path, options: dict[str, object]) -> None:
    path = written(tmp_path, mtp=True, **options)
    config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
    assert config.mtp_layers == 1
    checkpoint.check_all(config)
    role = Role("local", True, range(config.num_experts))
    with_layer = rank_tensors(config, checkpoint.tensors, role)
    without = rank_tensors(config.with_mtp(False), checkpoint.tensors, role)
    assert {name.partition("[")[0] for name in with_layer} == set(checkpoint.tensors)
    assert set(with_layer) - set(without) == {name for name in with_layer if name.startswith("mtp.")}


def test_both_layouts_hold_the_same_experts(tmp_path: Path) -> None:
    sums = []
    for layout in ("published", "packed"):
        path = written(tmp_path / layout, mtp=True, mtp_layout=layout)
        config = ModelConfig.load(path)
        kernels = select_kernels(CPU, "reference")
        share = ExpertShare(tuple(range(5)), 8, (range(8),))
        bank = ExpertBank.load(Checkpoint.open(path), config, share, kernels, torch.float32, CPU)
        x_TD = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(2))
        ids_TK = torch.tensor([[0, 4], [3, 1], [2, 7]], dtype=torch.int32)  # the last is held elsewhere
        sums.append(bank.partial_sum(config.mtp_index, x_TD, ids_TK, torch.ones(3, 2)))
    assert torch.equal(*sums)
    assert sums[0].abs().sum() > 0


def test_checkpoints_without_it_and_damaged_ones(tmp_path: Path) -> None:
    assert count_mtp_layers(written(tmp_path / "plain")) == 0
    assert count_mtp_layers(tmp_path / "nowhere") == 0
    path = written(tmp_path / "lacking", mtp=True)
    tensors = load_file(path / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "mtp.fc.weight"}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mtp.fc.weight: missing"):
        Checkpoint.open(path).check_all(ModelConfig.load(path))
    Checkpoint.open(path).check_all(ModelConfig.load(path).with_mtp(False))
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert count_mtp_layers(path) == 0, "to complain is the reader's part"


def test_a_second_layer_is_refused_by_name_unless_drafting_is_off(tmp_path: Path) -> None:
    path = written(tmp_path, mtp=True)
    tensors = load_file(path / "model.safetensors")
    more = {name.replace("layers.0", "layers.1"): t.clone() for name, t in tensors.items() if name.startswith("mtp.l")}
    save_file(tensors | more, path / "model.safetensors")
    config = ModelConfig.load(path)
    with pytest.raises(ConfigError, match=r"mtp.layers.1 = '2 layers': more than one MTP layer"):
        config.with_mtp(True)
    Checkpoint.open(path).check_all(config.with_mtp(False))
