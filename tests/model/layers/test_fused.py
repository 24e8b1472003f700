"""Fused operations give the bits of the operations one by one, and leave the same memory."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.kernels.native.dense import GEMM_ROWS
from divisi.kernels.sampling.layout import Draw, Draws
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.kernels.conftest import BUILDS
from tests.support.model_steps import CPU, LayerByLayer, ModelSteps

CONFIG = SMALL_CONFIG | {
    "vocab_size": 211,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "mlp_only_layers": [1],
}
DTYPES = [torch.float32, torch.bfloat16]
SEQUENCES = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused")
    write_random_checkpoint(path, CONFIG, seed=5, tokenizer=False, mtp=True)
    return path


def load(path: Path, kernels: Kernels, dtype: torch.dtype, *, whole: bool = True) -> ModelSteps:
    """Passes of few rows are one call each, or layers are."""
    model = ModelSteps.load(path, kernels, dtype, sequences=SEQUENCES, most_tokens=64, max_rows=4)
    if not whole:
        model.dispatcher = LayerByLayer(model.dispatcher._experts)
    return model


def walk(model: ModelSteps, rows: Sequence[int]) -> list[Tensor]:
    """Prompts, then steps of some rows of each sequence, the last of which are rejected, and drafts after each."""
    rng = random.Random(7)
    found = [*model.step({}, {index: tokens(rng, 3 + index) for index in range(SEQUENCES)}).values()]
    for count in rows:
        rejected = {index: rng.randrange(count) for index in range(SEQUENCES)}
        found += model.step({i: tokens(rng, count) for i in range(SEQUENCES)}, {}, rejected=rejected).values()
        hidden = None
        for ahead in range(3):
            logits, hidden = model.draft({i: rng.randrange(211) for i in range(SEQUENCES)}, ahead, hidden)
            found += [logits, hidden]
    return found


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(211) for _ in range(count)]


def memory(model: ModelSteps) -> list[Tensor]:
    store = model.runner.store
    pools = [tensor for pool in store.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
    return [store.hidden_SND, *pools, *(tensor for state in store.delta.values() for tensor in state.tensors)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", BUILDS)
def test_the_same_bits(checkpoint: Path, build: str, dtype: torch.dtype, deterministic: bool) -> None:
    """20 to 80 rows: from 48 on torch takes products of unpacked weights, where it may."""
    assert SEQUENCES < GEMM_ROWS < 3 * SEQUENCES
    kernels = select_kernels(CPU, build, deterministic=deterministic)
    apart = cast(Kernels, SimpleNamespace(**vars(kernels) | {"fused": None}))
    one_by_one = load(checkpoint, apart, dtype)
    wanted = walk(one_by_one, (1, 4, 3))
    for fused in (load(checkpoint, kernels, dtype), load(checkpoint, kernels, dtype, whole=False)):
        for actual, expected in zip(walk(fused, (1, 4, 3)), wanted, strict=True):
            assert torch.equal(actual, expected)
        for actual, expected in zip(memory(fused), memory(one_by_one), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(checkpoint: Path, dtype: torch.dtype) -> None:
    """The same bits of passes that one thread, two and five compute: of 80 rows, which are worth a crew, and of 20."""
    kernels, before, found = select_kernels(CPU, "native", deterministic=True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            model = load(checkpoint, kernels, dtype)
            found.append([*walk(model, (1, 4)), *memory(model)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_drafts_at_once_are_those_of_one_pass_after_another(checkpoint: Path, dtype: torch.dtype) -> None:
    """Of nine, six and two sequences, greedy, drawn, and drawn with filters: the same tokens, and the same memory."""
    kernels, rng = select_kernels(CPU, "native"), random.Random(3)
    at_once, in_turn = (load(checkpoint, kernels, dtype) for _ in range(2))
    prompts = {index: tokens(rng, 3 + index) for index in range(9)}
    last = {index: rng.randrange(211) for index in prompts}
    parameters = [Draw(seed=index, temperature=0.7 * (index % 3), top_k=5 * (index % 2)) for index in prompts]
    for model in (at_once, in_turn):
        model.step({}, prompts)
    counts, hidden, drafted = (9, 6, 2), None, []
    for ahead, count in enumerate(counts):
        now = {index: (drafted[-1][index] if drafted else last[index]) for index in range(count)}
        logits, hidden = in_turn.draft(now, ahead, None if hidden is None else hidden[:count])
        positions = np.array([len(prompts[index]) + ahead + 1 for index in range(count)])
        drafted.append(kernels.choose_tokens(logits, Draws(parameters[:count]), positions).tolist())
    assert at_once.runner.drafts_at_once(9, at_once.dispatcher)
    passes = at_once.runner.draft_all(at_once.draft_batch(last, 0), counts, at_once.dispatcher, Draws(parameters))
    assert passes.tokens == drafted
    assert len(passes.seconds) == len(counts)
    for actual, expected in zip(memory(at_once), memory(in_turn), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_drawn_with_the_pass(
    checkpoint: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that its logits would give: greedy, drawn, and drawn with filters."""
    kernels, rng = select_kernels(CPU, "native"), random.Random(3)
    by_logits, at_once = (load(checkpoint, kernels, dtype) for _ in range(2))
    prompts = {index: tokens(rng, 3 + index) for index in range(9)}
    parameters = Draws([Draw(seed=row, temperature=0.7 * (row % 3), top_k=5 * (row % 2)) for row in range(3 * 9)])
    for model in (by_logits, at_once):
        model.step({}, prompts)
    rows = {index: tokens(rng, 3) for index in prompts}
    logits = torch.cat([*by_logits.step(rows, {}).values()])
    positions = np.array([len(prompts[index]) + ahead + 1 for index in prompts for ahead in range(3)])
    draw = at_once.runner.draw
    monkeypatch.setattr(at_once.runner, "forward", lambda *step: torch.tensor(draw(*step, parameters)))
    drawn = torch.cat([*at_once.step(rows, {}).values()])
    assert torch.equal(drawn, kernels.choose_tokens(logits, parameters, positions))


def test_a_measured_step_goes_layer_by_layer(checkpoint: Path) -> None:
    """Whoever counts the rows of experts sees them; between two measurements nothing is asked of it."""
    kernels = select_kernels(CPU, "native")
    model = load(checkpoint, kernels, torch.float32)
    meter = MeteredExperts(model.dispatcher._experts, range(5), 16, CPU)
    model.dispatcher = LocalEnd(meter)
    model.step({}, {0: [3, 4, 5]})
    model.step({0: [6]}, {})
    assert not sum(meter.stats()["expert_tokens"].values())
    meter.measuring = True
    model.step({0: [7]}, {})
    assert sum(meter.stats()["expert_tokens"].values()) > 0


def test_who_has_them(checkpoint: Path) -> None:
    """Only where all operations are the same implementation's."""
    assert select_kernels(CPU, "native").fused is not None
    for choice in ("reference", "auto,route=reference", "reference,linear=native"):
        assert select_kernels(CPU, choice).fused is None


def test_a_step_of_few_rows_is_one_call_a_mixer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the operations that are fused is called by itself."""
    kernels = select_kernels(CPU, "native")
    model = load(checkpoint, kernels, torch.float32)
    model.step({}, {0: [3, 4, 5]})

    def called(*_: object) -> Tensor:
        raise AssertionError("called by itself")

    for name in ("gated_delta_decode", "attention_inputs", "attention_decode", "route", "rms_norm"):
        monkeypatch.setattr(kernels, name, called)
    model.step({0: [6, 7]}, {})
    model.draft({0: 8}, 0, None)
