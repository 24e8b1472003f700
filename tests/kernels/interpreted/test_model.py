"""The whole model on the Triton kernels, beside the references in fp32 on the same weights, which are the oracle.

All get the same tokens, those that the oracle chooses. In fp32 the kernels must come as near as other orders of sums
do. In bf16, as on a GPU, a layer rounds often enough for another expert to be chosen now and then: the references with
bf16 activations are as wrong as that by themselves, and say how wrong the kernels may be.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from divisi.kernels.attention import triton as attention
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.mixture import triton as mixture
from divisi.kernels.norm import triton as norm
from divisi.kernels.select import Kernels, assembled, select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import shard_experts
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.honest_interpreter import planted
from tests.support.model_steps import CPU, ModelSteps

BF16, FP32 = torch.bfloat16, torch.float32
FARTHER = 1.5
"""How many times as far as the references in bf16 the kernels may be from the oracle, on average."""
EXACT = 1e-4
"""Of log-probabilities, of two layers in fp32: sums run in another order, the scan's products are three of tf32."""
REFERENCE = select_kernels(CPU, "reference")
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Split:
    """Two shards without processes or a wire, which moves bits only: each sums its own, then these are added."""

    banks: tuple[ExpertBank, ...]

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Sums:
        return Sums([bank.partial_sum(layer, x_TD, expert_ids_TK, gates_TK) for bank in self.banks])


@dataclass(frozen=True)
class Sums:
    of_shards: list[Tensor]

    def combine(self) -> Tensor:
        return self.of_shards[0] + self.of_shards[1]


@dataclass(frozen=True)
class Trial:
    """A checkpoint, some prompts, and what the oracle answers: tokens, and the logits [N, S, V] that they come from."""

    path: Path
    prompts: list[list[int]]
    count: int

    def run(
        self, kernels: Kernels, dtype: torch.dtype, tokens: Sequence[list[int]] | None = None, *, split: bool = False
    ) -> Tensor:
        """The logits at each of ``count`` tokens; goes on with ``tokens``, or with the likeliest ones."""
        most = len(self.prompts[0]) + self.count
        steps = ModelSteps.load(self.path, kernels, dtype, sequences=len(self.prompts), most_tokens=most)
        steps.runner._activation_dtype = dtype
        if split:
            config, checkpoint = ModelConfig.load(self.path), Checkpoint.open(self.path)
            banks = [ExpertBank.load(checkpoint, config, own, kernels, dtype, CPU) for own in shard_experts(config, 2)]
            steps.dispatcher = Split(tuple(banks))  # type: ignore[assignment]
        rows = steps.step({}, dict(enumerate(self.prompts)), last_only=True)
        told = [torch.stack([row[-1] for row in rows.values()])]
        while len(told) < self.count:
            next_S = told[-1].argmax(-1).tolist() if tokens is None else tokens[len(told) - 1]
            rows = steps.step({i: [token] for i, token in enumerate(next_S)}, {})
            told.append(torch.stack([row[-1] for row in rows.values()]))
        return torch.stack(told)


def trial(folder: Path, prompts: int, length: int, count: int, changes: dict[str, object]) -> Trial:
    write_random_checkpoint(folder, SMALL_CONFIG | changes, seed=5, tokenizer=False)
    generator = torch.Generator().manual_seed(7)
    return Trial(folder, [torch.randint(1280, (length,), generator=generator).tolist() for _ in range(prompts)], count)


def triton() -> Kernels:
    return assembled({"triton": triton_operations(Chip.H100)}, "triton")


def off(logits_NSV: Tensor, truth_NSV: Tensor) -> Tensor:
    """How far log-probabilities are from the oracle's."""
    return (logits_NSV.log_softmax(-1) - truth_NSV.log_softmax(-1)).abs()


def expect_as_good_as_the_references(found_NSV: Tensor, theirs_NSV: Tensor, truth_NSV: Tensor) -> str:
    """What was measured; AssertionError where the kernels are worse than rounding to bf16 makes the references."""
    ours, theirs = off(found_NSV, truth_NSV).mean().item(), off(theirs_NSV, truth_NSV).mean().item()
    assert ours <= FARTHER * theirs, f"{ours:.3f} from the oracle on average, the references in bf16 {theirs:.3f}"
    margin = (theirs_NSV - truth_NSV).abs().amax(-1).mean().item()
    best_NS2 = truth_NSV.topk(2).values
    other_NS = found_NSV.argmax(-1) != truth_NSV.argmax(-1)
    apart_M = (best_NS2[..., 0] - best_NS2[..., 1])[other_NS]
    widest = apart_M.max().item() if len(apart_M) else 0.0
    assert widest <= margin, f"another token where the oracle's best two are {widest:.2f} apart, more than {margin:.2f}"
    allowed = 1 + FARTHER * (theirs_NSV.argmax(-1) != truth_NSV.argmax(-1)).sum().item()
    assert len(apart_M) <= allowed, f"{len(apart_M)} other tokens, {allowed:.0f} allowed"
    return (
        f"{other_NS.numel()} tokens, {len(apart_M)} other ones, best two at most {widest:.2f} apart of {margin:.2f}; "
        f"{ours:.4f} from the oracle, {ours / theirs:.2f} of the references in bf16"
    )


def test_two_layers_in_bf16(tmp_path: Path) -> None:
    tried = trial(tmp_path, 1, 9, 3, TWO_LAYERS)
    truth = tried.run(REFERENCE, FP32)
    tokens = truth.argmax(-1).tolist()
    found, split = (tried.run(triton(), BF16, tokens, split=split) for split in (False, True))
    assert torch.equal(found, split), "a split model has the bits of one that is not"
    told = expect_as_good_as_the_references(found, tried.run(REFERENCE, BF16, tokens), truth)
    print(f"two layers in bf16: {told}")


@pytest.mark.verify
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("split", [False, True], ids=["local", "split"])
def test_the_whole_model_in_bf16(split: bool, tmp_path: Path) -> None:
    tried = trial(tmp_path, 8, 24, 12, {})
    truth = tried.run(REFERENCE, FP32)
    tokens = truth.argmax(-1).tolist()
    began = time.process_time()
    found = tried.run(triton(), BF16, tokens, split=split)
    took = time.process_time() - began
    told = expect_as_good_as_the_references(found, tried.run(REFERENCE, BF16, tokens), truth)
    print(f"whole model in bf16, {'split' if split else 'local'}: {told}; {took:.0f} s of a processor")


@pytest.mark.verify
@pytest.mark.parametrize(
    ("module", "kernel", "right", "wrong"),
    [
        (attention, "attention_join_fwd_kernel", "/ b_sum * tl.sigmoid(b_gate.to(tl.float32))", "/ b_sum"),
        (mixture, "mixture_norm_fwd_kernel", "gate = tl.sigmoid(tl.load(p_gate + i_t * gate_stride).to(tl.float32))",
         "gate = 1.0"),
    ],
    ids=["attention", "shared expert"],
)  # fmt: skip
def test_a_missing_gate_is_caught_in_bf16(
    module: ModuleType, kernel: str, right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, kernel, planted(module, kernel, right, wrong))
    tried = trial(tmp_path, 1, 9, 3, TWO_LAYERS)
    truth = tried.run(REFERENCE, FP32)
    tokens = truth.argmax(-1).tolist()
    with pytest.raises(AssertionError, match="from the oracle on average"):
        expect_as_good_as_the_references(tried.run(triton(), BF16, tokens), tried.run(REFERENCE, BF16, tokens), truth)


def test_in_fp32(tmp_path: Path) -> None:
    tried = trial(tmp_path, 1, 9, 3, TWO_LAYERS)
    truth = tried.run(REFERENCE, FP32)
    worst = off(tried.run(triton(), FP32, truth.argmax(-1).tolist()), truth).max().item()
    print(f"two layers in fp32: {worst:.1e} from the oracle")
    assert worst <= EXACT


@pytest.mark.verify
def test_a_kernel_that_rounds_once_more_is_caught_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = "b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps) * b_scale", ".to(tl.bfloat16).to(tl.float32)"
    monkeypatch.setattr(norm, "rms_norm_fwd_kernel", planted(norm, "rms_norm_fwd_kernel", right, f"({right}){wrong}"))
    tried = trial(tmp_path, 1, 9, 3, TWO_LAYERS)
    truth = tried.run(REFERENCE, FP32)
    assert off(tried.run(triton(), FP32, truth.argmax(-1).tolist()), truth).max().item() > 5 * EXACT
