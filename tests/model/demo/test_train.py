"""The training program: it learns, the same seed gives the same weights, and a drafts stage leaves the model alone."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from divisi.model.demo import checkpoint_dir
from divisi.model.demo.batches import Batches, Taste, Writer
from divisi.model.demo.stages import STAGES, begin, run_stage
from divisi.model.demo.train import loss_of
from divisi.model.demo.workers import Shared, Worker, flat_buffer

SMALL = 96
"""Tokens: one row."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder without weights."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(checkpoint_dir() / name, tmp_path)
    return tmp_path


def train_briefly(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, workers: int) -> dict[str, torch.Tensor]:
    brief = dataclasses.replace(STAGES[name], steps=2, warmup=1, widths={SMALL: 1.0}, tokens=SMALL)
    monkeypatch.setitem(STAGES, name, brief)
    run_stage(name, folder, seed=1, workers=workers)
    return load_file(folder / "model.safetensors")


def test_workers_and_seed_decide_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_briefly(monkeypatch, "main", folder, workers=2)
    (folder / "model.safetensors").unlink()
    second = train_briefly(monkeypatch, "main", folder, workers=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_drafts_stage_changes_the_mtp_layer_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = train_briefly(monkeypatch, "main", folder, workers=1)
    after = train_briefly(monkeypatch, "drafts", folder, workers=1)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "mtp.fc.weight" in changed
    assert all(name.startswith("mtp.") for name in changed)


def test_a_killed_training_leaves_no_worker(folder: Path) -> None:
    command = [sys.executable, "-m", "divisi.model.demo", "train", "begin", "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
        assert training.stdout is not None
        workers: list[psutil.Process] = []
        for line in training.stdout:  # both have taken a step when the first line comes
            if "step 0" in line:
                workers = psutil.Process(training.pid).children(recursive=True)
                break
        training.kill()
        assert workers
        _, left = psutil.wait_procs(workers, timeout=30)
        for worker in left:
            worker.kill()
        assert not left


def test_every_loss_falls_on_a_batch_seen_again_and_again(folder: Path) -> None:
    network = begin(seed=2)
    worker = Worker(Shared(network, [flat_buffer(network)], threading.Barrier(1)), 0, 0.02, 3e-3)
    batch = Batches(Writer(folder), "1", Taste("train")).take(SMALL, SMALL)
    losses = []
    for _ in range(12):
        worker.clear()
        loss = loss_of(network, batch, mtp_depth=2)
        loss.total.backward()
        worker.update(1.0)
        losses.append(loss)
    assert losses[-1].said < 0.5 * losses[0].said
    assert losses[-1].mtp < 0.7 * losses[0].mtp
    assert losses[-1].right > losses[0].right
