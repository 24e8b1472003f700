"""KV memory by the size of a GPU, planned where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from divisi.deploy.cli import main
from divisi.deploy.cli.card import own_gpu_memory
from divisi.deploy.settings import Settings
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint

Report = Callable[..., dict[str, Any]]
MANY_TOKENS = SMALL_CONFIG | {"max_position_embeddings": 2**20}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(path, MANY_TOKENS, seed=1)
    return path


@pytest.fixture
def report(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Report:
    def run(*flags: str) -> dict[str, Any]:
        assert main(["inspect", str(model_dir), "--json", *flags]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return run


@pytest.mark.parametrize(
    "flags", [(), ("--expert-shards", "2"), ("--topology", "colocated", "--attention-workers", "2")]
)
@pytest.mark.parametrize("fraction", [0.9, 0.5])
def test_pages_take_what_weights_and_states_leave(report: Report, flags: tuple[str, ...], fraction: float) -> None:
    size = 256 * 2**20
    planned = report("--gpu-memory", "256MiB", "--gpu-memory-fraction", str(fraction), *flags)
    assert planned["model"]["device"] == "cuda"
    worker = planned["ranks"][0]
    page = worker["kv_bytes"] // worker["pages"] + worker["rotation_bytes"] // worker["pages"]
    assert worker["rotation_bytes"] == 4 * 8 * worker["tokens"], "8 rotary dims"
    assert fraction * size - page - 1 <= worker["memory_bytes"] <= fraction * size
    assert planned["model"]["max_model_len"] == worker["tokens"], "one sequence may have all pages"


def test_rotations_end_with_the_model_s_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Then further pages bring none along, and are not paid for."""
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"max_position_embeddings": 1024})
    assert main(["inspect", str(tmp_path), "--json", "--gpu-memory", "64MiB", "--max-seqs", "64"]) == 0
    worker = json.loads(capsys.readouterr().out)["ranks"][0]
    assert worker["tokens"] > 1024
    assert worker["rotation_bytes"] == 4 * 8 * 1024


def test_experts_elsewhere_leave_more(report: Report) -> None:
    alone, shared = (report("--gpu-memory", "256MiB", *flags) for flags in ((), ("--expert-shards", "2")))
    assert shared["ranks"][0]["tokens"] > alone["ranks"][0]["tokens"]


def test_what_is_given_is_kept(report: Report) -> None:
    assert report("--gpu-memory", "80GiB", "--kv-memory", "16MiB") == report("--kv-memory", "16MiB", "--device", "cuda")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpu-memory", "1MiB"], "cache.gpu_memory_fraction: 0.9 of a GPU's 1048576 bytes are 943718"),
        (["--gpu-memory", "1MiB"], "share the experts out with gang.expert_shards"),
        (["--gpu-memory-fraction", "2", "--gpu-memory", "1GiB"], "cache.gpu_memory_fraction"),
    ],
)
def test_too_little_is_refused(
    model_dir: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(model_dir), *flags]) != 0
    assert says in capsys.readouterr().err


def test_a_size_that_is_none(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(model_dir), "--gpu-memory", "much"])
    assert "'much' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gang", "sizes", "memory"),
    [
        ({}, [], None),
        ({}, [80, 40], 40),
        ({"device": "cpu"}, [80], None),
        ({"expert_shards": 2}, [80, 40], None),
        ({"expert_shards": 2, "device": "cuda"}, [80, 40], 40),
    ],
)
def test_the_smallest_card_counts_where_ranks_will_have_it(
    gang: dict[str, object], sizes: list[int], memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=sizes[i]))
    assert own_gpu_memory(Settings.from_args({"model": {"model_dir": "/m"}, "gang": gang})) == memory
