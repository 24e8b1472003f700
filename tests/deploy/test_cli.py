"""The command line: what it prints, and that mistakes end in one line and status 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from divisi.deploy.cli import main
from divisi.deploy.settings import Settings
from divisi.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["checkpoint", "random", "--out", str(out), "--seed", "3"]) == 0
    return out


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`divisi serve` runs its driver in a fork, which no test process may become."""
    monkeypatch.setattr("divisi.deploy.supervision.supervised", lambda work, undo, grace_s: work(None))


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["serve"], ["chat"], ["bench"], ["inspect"], ["checkpoint", "random"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_crash() -> None:
    command = [sys.executable, "-m", "divisi.deploy.cli", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1


def test_inspect_json_adds_up(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--attention-workers", "2", "--expert-shards", "3", "--kv-memory", "4MiB", "--max-seqs", "4"]
    assert main(["inspect", str(model_dir), "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    ranks = {rank["seat"]: rank for rank in report["ranks"]}
    assert list(ranks) == ["attention:0", "attention:1", "expert:0", "expert:1", "expert:2"]
    assert ranks["attention:0"]["kv_bytes"] <= 4 * 2**20
    assert ranks["attention:0"]["pages"] * ranks["attention:0"]["page_size"] == ranks["attention:0"]["tokens"]
    assert ranks["attention:0"]["state_slots"] > 4
    once = [rank for seat, rank in ranks.items() if seat != "attention:1"]
    tensors = Checkpoint.open(model_dir).tensors
    assert sum(rank["bytes_on_disk"] for rank in once) == sum(info.num_bytes for info in tensors.values())
    assert sum(rank["tensors"] for rank in once) == len(tensors)


def test_inspect_shows_what_colocated_ranks_hold(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_dir), "--json", "--topology", "colocated", "--attention-workers", "3"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert [rank["seat"] for rank in ranks] == ["attention:0", "attention:1", "attention:2"]
    assert [rank["experts"] for rank in ranks] == [[*range(6)], [*range(6, 11)], [*range(11, 16)]]
    assert all(rank["kv_bytes"] > 0 for rank in ranks)
    assert main(["inspect", str(model_dir), "--json"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)["ranks"]
    assert all(rank["weight_bytes"] < whole["weight_bytes"] for rank in ranks)


def test_inspect_counts_weights_in_the_dtype_served(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model_dir), "--json", "--dtype", "float32"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["seat"] == "local"
    elements = sum(math.prod(info.shape) for info in Checkpoint.open(model_dir).tensors.values())
    assert rank["weight_bytes"] == 4 * elements == 2 * rank["bytes_on_disk"]


def test_inspect_table_recognises_mtp(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((model_dir / name).read_text())
    tensors = load_file(model_dir / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "MTP layer: 1 tensors" in out
    assert "not loaded" in out
    assert "local" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["inspect", "{dir}", "--expert-shards", "17"], "16 experts"),
        (["serve", "{dir}", "--max-model-len", "8193"], "8192 positions"),
        (["inspect", "{dir}", "--expert-shards", "many"], "gang.expert_shards"),
        (["inspect", "{dir}", "--kv-memory", "lots"], "512MiB"),
        (["inspect", "{dir}/none"], "no directory"),
        (["serve", "{dir}", "--port", "high"], "http.port"),
        (["serve", "{dir}", "--config", "{dir}/none.toml"], "none.toml"),
        (["serve", "{dir}/.."], "config.json"),
        (["checkpoint", "random", "--out", "{dir}"], "not empty"),
        (["checkpoint", "random", "--out", "{dir}/new", "--like", "{dir}/none.json"], "none.json"),
    ],
)
def test_mistakes(arguments: list[str], part: str, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument.replace("{dir}", str(model_dir)) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("divisi: error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_serve_passes_the_settings_on(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Settings, bool]] = []
    fake = SimpleNamespace(serve_until_stopped=lambda settings, orders, *, replace: seen.append((settings, replace)))
    monkeypatch.setitem(sys.modules, "divisi.deploy.local_run", fake)
    config = tmp_path / "c.toml"
    config.write_text(f'[model]\nmodel_dir = "{model_dir}"\n[http]\nport = 1\nhost = "0.0.0.0"\n')
    assert main(["serve", "--config", str(config), "--port", "9", "--expert-shards", "2"]) == 0
    ((settings, replace),) = seen
    assert not replace
    assert main(["serve", str(model_dir), "--replace"]) == 0
    assert seen[1][1]
    assert (settings.http.port, settings.http.host) == (9, "0.0.0.0")
    assert (settings.gang.topology, settings.gang.expert_shards) == ("split", 2)


def test_like_copies_a_shape(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "like"
    assert main(["checkpoint", "random", "--out", str(out), "--like", str(model_dir), "--layout", "packed"]) == 0
    assert "model.layers.0.mlp.experts.down_proj" in Checkpoint.open(out).names


def test_random_checkpoint_where_nothing_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["checkpoint", "random", "--out", str(tmp_path / "file" / "tiny")]) == 2
    assert capsys.readouterr().err.startswith("divisi: error: --out: cannot write")
