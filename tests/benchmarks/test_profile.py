"""Where a step's time goes: all of it is accounted for, and what it is compared with is counted right."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from divisi.benchmarks import profile
from divisi.model.config import ModelConfig
from divisi.model.random_checkpoint import write_random_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile")
    write_random_checkpoint(path)
    return path


def test_a_line_for_each_cell(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(profile, "_CELLS", (("decode", 1), ("decode", 4), ("prefill", 64)))
    monkeypatch.setattr(profile, "_STEPS", 3)
    monkeypatch.setattr(profile, "_ROUNDS", 2)
    assert profile.main(argparse.Namespace(model=small, threads=torch.get_num_threads())) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "kernels: " in head
    assert [line.partition(":")[0] for line in lines] == ["decode 1", "decode 4", "prefill 64"]
    for line in lines:
        shares = [int(share) for share in re.findall(r" (-?\d+) %(?! of)", line)]
        assert re.match(r"\S+ \d+: [\d.]+ \([\d.]+ to [\d.]+\) ms;", line), line
        assert len(shares) > 3, line
        assert all(0 <= share <= 100 for share in shares), line
    assert re.search(r"GB/s, \d+ \(\d+ to \d+\) % of [\d.]+ \(", lines[0])
    assert re.search(r"GFLOP/s, \d+ \(\d+ to \d+\) % of [\d.]+ \(", lines[2])


def test_bytes_and_operations_are_those_of_the_checkpoint_s_matrices(small: Path) -> None:
    """Every matrix once, of the experts those that a token visits; states in and out."""
    config, values = ModelConfig.load(small), 0.0
    share = config.num_experts_per_tok / config.num_experts
    for file in small.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2 and "embed_tokens" not in name:
                    values += math.prod(shape) * (share if ".experts." in name else 1.0)
    heads = config.linear_num_value_heads
    states = 2 * 4 * heads * config.linear_key_head_dim * config.linear_value_head_dim * len(config.linear_layers)
    assert profile.token_bytes(config) == 2 * values + states
    head = config.vocab_size * config.hidden_size
    attention = 2 * 10 * 10 * config.num_attention_heads * config.head_dim * len(config.full_layers)
    assert profile.prefill_flops(config, 10) == 2 * (10 * (values - head) + head) + attention
