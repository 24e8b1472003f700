"""Decode steps that are laid out for a bucket: sequences of slot -1 without rows, and rows that no sequence owns.

Padding changes no bit of anybody's results or memory, and what comes of it is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import Case, Draw, copied
from divisi.benchmarks.gpu.check import bit_equal
from divisi.benchmarks.gpu.padding import ADDED, expect_padding_to_be_nobodys, padded_cases
from divisi.benchmarks.gpu.shapes import SMALL_HEADS
from divisi.cluster.dispatch.local import LocalEnd
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.request import Request, Sampling
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.batch import StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from divisi.model.runner import ModelRunner
from divisi.model.sampling.sampler import Sampler
from divisi.model.state import StateStore
from divisi.model.weights import load_weights

CPU, BF16 = torch.device("cpu"), torch.bfloat16
TRITON = assembled({"triton": triton_operations(Chip.H100)}, "triton")
CASES = dict(zip(("delta decode", "delta verify", "attention"), padded_cases(Draw(1, BF16, CPU)), strict=True))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.verify if "verify" in name else ()) for name, case in CASES.items()],
    ids=list(CASES),
)
@pytest.mark.parametrize(("rows", "sequences"), ADDED)
def test_an_operation(case: Case, rows: int, sequences: int) -> None:
    expect_padding_to_be_nobodys(TRITON, case, rows, sequences)


def test_keys_and_values_of_padding_are_written_nowhere() -> None:
    case = cases.attention_inputs(Draw(4, BF16, CPU), "", 5, SMALL_HEADS, 4)
    rows, angles, norm, pool, kv_rows, heads = case.arguments
    exact, found = copied(pool), copied(pool)
    TRITON.attention_inputs(rows[:3], angles[:3], norm, exact, kv_rows[:3], heads)
    kv_rows[3:] = -1
    TRITON.attention_inputs(rows, angles, norm, found, kv_rows, heads)
    bit_equal("attention_inputs", *({"key": pool.key_PJD, "value": pool.value_PJD} for pool in (exact, found)))


def test_padding_chooses_no_expert() -> None:
    draw, reference = Draw(5, BF16, CPU), assembled({"reference": {}}, "reference")
    x = draw.normal(6, 16).round()
    weights = [draw.normal(*size).round() for size in ((11, 16), (16,), (32, 16), (16, 16))]
    starts = draw.ints([0, 1, 4, 4])
    chosen = {}
    for name, kernels in (("triton", TRITON), ("reference", reference)):
        rows = kernels.mixture.inputs(x, kernels.mixture.pack(*weights), 3, True, starts)
        assert (rows.ids_TK[4:] == -1).all()
        chosen[name] = rows
    assert torch.equal(chosen["triton"].ids_TK, chosen["reference"].ids_TK)
    torch.testing.assert_close(chosen["triton"].gates_TK[:4], chosen["reference"].gates_TK[:4])


class Seen(ModelRunner):
    """Keeps the shapes of its passes."""

    shapes: list[tuple[int, int]]

    def forward(self, batch: StepBatch, dispatcher: LocalEnd) -> Tensor:  # type: ignore[override]
        if batch.decode is not None and batch.prefill is None:
            self.shapes.append((batch.num_tokens, batch.decode.slots_S.shape[0]))
        return super().forward(batch, dispatcher)


def answers(path: Path, drafts: int, lengths: list[int], *, padded: bool) -> Iterator[object]:
    """Those of an engine over the Triton path, fp32; then what its memory holds, and the shapes of its passes."""
    config, checkpoint = ModelConfig.load(path).with_mtp(drafts > 0), Checkpoint.open(path)
    limits = SchedulerConfig(
        vocab_size=config.vocab_size, max_model_len=64, num_pages=32, page_size=8, num_slots=10, max_seqs=5,
        max_step_tokens=64, max_draft_tokens=drafts,
    )  # fmt: skip
    store = StateStore(
        config, num_pages=32, page_size=8, num_slots=10, max_rows=1 + drafts, dtype=torch.float32, device=CPU
    )
    weights = load_weights(checkpoint, config, TRITON, torch.float32, CPU)
    bank = ExpertBank.load(checkpoint, config, whole_share(config), TRITON, torch.float32, CPU)
    runner = Seen(config, weights, store, TRITON)
    runner.shapes = []
    engine = Engine(
        runner, Sampler(TRITON.choose_tokens), Scheduler(limits), device=CPU, stopwatch=runner.stopwatch, padded=padded
    )
    for index, length in enumerate(lengths):
        prompt = tuple(1 + (7 * index + 3 * i) % 60 for i in range(3 + index))
        engine.submit(Request(str(index), prompt, length, Sampling(0.9 * (index % 2), seed=index)))
    found: dict[str, list[int]] = {str(index): [] for index in range(len(lengths))}
    while (plan := engine.plan()) is not None:
        for event in engine.run(plan, LocalEnd(bank)):
            found[event.request_id] += event.token_ids
    yield found
    states = [tensor[:-1] if tensor is store.hidden_SND else tensor for tensor in _memory(store)]
    yield states
    yield runner.shapes


def _memory(store: StateStore) -> list[Tensor]:
    pools = [tensor for pool in store.kv.values() for tensor in (pool.key_PJD, pool.value_PJD)]
    return [store.hidden_SND, *pools, *(tensor for state in store.delta.values() for tensor in state.tensors)]


@pytest.mark.parametrize(
    ("drafts", "lengths"),
    [(0, [2, 2, 2]), pytest.param(2, [2, 9, 6, 4, 5], marks=pytest.mark.verify)],
    ids=["one row a sequence", "drafts"],
)
def test_an_engine_gives_the_same_answers(drafts: int, lengths: list[int], tmp_path: Path) -> None:
    """Sequences end one by one, so that most steps have padding; what is left in memory is the same, too."""
    small = {"vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    small["layer_types"] = ["linear_attention", "full_attention"]
    write_random_checkpoint(tmp_path, SMALL_CONFIG | small, seed=3, tokenizer=False, mtp=drafts > 0)
    exact, held, shapes = answers(tmp_path, drafts, lengths, padded=False)
    found, kept, filled = answers(tmp_path, drafts, lengths, padded=True)
    assert found == exact
    assert len(filled) == len(shapes)
    assert filled != shapes
    assert {runs for _, runs in filled} <= {1, 2, 4, 5}
    for one, other in zip(held, kept, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, equal_nan=True)
