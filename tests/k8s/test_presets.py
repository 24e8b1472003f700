"""The presets fit the model and the cards that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from divisi.deploy.cli.main import main
from divisi.deploy.settings.values import parse_bytes
from divisi.model.demo import checkpoint_dir
from tests.k8s.helm import preset, render, settings_of
from tests.support.sparse_checkpoint import write_sparse_checkpoint

CARDS = {"gpu-1": "200GiB", "gpu-2": "131GiB", "gpu-4": "79GiB"}
"""Of one GPU: less than a B300 has, what an H200 and an H100 have."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "Qwen3-Next-80B-A3B-Instruct"
    write_sparse_checkpoint(folder)
    for file in checkpoint_dir().glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", CARDS)
def test_a_gpu_preset_fits_its_cards(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args: dict[str, Any] = settings_of(render(preset(name)))
    args["model"]["model_dir"] = str(model)
    config = tmp_path / "divisi.json"
    config.write_text(json.dumps(args), encoding="utf-8")
    assert main(["inspect", "--config", str(config), "--gpu-memory", CARDS[name], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    room = 0.9 * parse_bytes(CARDS[name])  # type: ignore[operator]
    assert all(rank["memory_bytes"] < room for rank in report["ranks"]), report["ranks"]
    assert report["model"]["device"] == "cuda"
    assert report["model"]["max_model_len"] > 200_000
