"""Steps before anybody's: all sizes run, and leave memory as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.select import select_kernels
from divisi.model import warm_up
from divisi.model.batch import StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.warm_up import Nowhere, StepSizes
from divisi.model.weights import load_weights

CPU = torch.device("cpu")
CONFIG = SMALL_CONFIG | {"num_hidden_layers": 4, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


def test_steps_of_all_sizes_leave_memory_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, CONFIG, seed=2, tokenizer=False, mtp=True)
    config, checkpoint, kernels = (
        ModelConfig.load(tmp_path).with_mtp(True),
        Checkpoint.open(tmp_path),
        select_kernels(CPU),
    )
    store = StateStore(config, num_pages=8, page_size=4, num_slots=6, max_rows=3, dtype=torch.float32, device=CPU)
    runner = ModelRunner(config, load_weights(checkpoint, config, kernels, torch.float32, CPU), store, kernels)
    seen: list[tuple[str, list[int], int]] = []
    forward = runner.forward

    def noted(batch: StepBatch, dispatcher: Nowhere) -> Tensor:
        rows = batch.decode or batch.prefill
        assert rows is not None
        kind = "decode" if batch.decode is not None else "prefill"
        seen.append((kind, rows.starts_S1.diff().tolist(), rows.pages_SN.shape[1]))
        return forward(batch, dispatcher)

    monkeypatch.setattr(runner, "forward", noted)
    warm_up.warm_up(runner, Nowhere(), StepSizes(sequences=5, rows=3, pages=8, tokens=20), CPU)
    for rows in (1, 2, 3):
        assert {len(runs) for kind, runs, _ in seen if kind == "decode" and runs[0] == rows} == {1, 2, 4, 5}
        assert {pages for kind, runs, pages in seen if runs == [rows] and kind == "decode"} == {1, 2, 4, 8}
    assert [runs for kind, runs, _ in seen if kind == "prefill"] == [[1], [2], [4], [8], [16], [20], [1, 1]]
    held = [store.hidden_SND, *(t for state in store.delta.values() for t in state.tensors)]
    held += [t for pool in store.kv.values() for t in (pool.key_PJD, pool.value_PJD)]
    assert not any(tensor.any() for tensor in held)


def test_a_shards_experts_get_rows_of_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path, CONFIG, seed=2, tokenizer=False)
    config = ModelConfig.load(tmp_path)
    kernels, checkpoint = select_kernels(CPU), Checkpoint.open(tmp_path)
    bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, torch.float32, CPU)
    seen: list[int] = []
    run = bank.partial_sum

    def noted(layer: int, x_TD: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        seen.append(len(x_TD))
        return run(layer, x_TD, ids_TK, gates_TK)

    monkeypatch.setattr(bank, "partial_sum", noted)
    warm_up.warm_up_experts(bank, config.moe_layers[0], config.hidden_size, 2, 12, torch.float32)
    assert seen == [1, 2, 4, 8, 12]
