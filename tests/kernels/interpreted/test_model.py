"""The whole model on the Triton kernels with bf16 activations, as on a GPU, beside the references in fp32.

Both get the same tokens, those that the references choose: a token counts as the same where it is, or where the
references' own margin between the two is within what rounding activations to bf16 moves a logit by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import Kernels, assembled, select_kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import shard_experts
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.model_steps import CPU, ModelSteps

BF16 = torch.bfloat16
MARGIN = 0.35
"""Of a logit, of a standard deviation of 3: eight layers' activations, each rounded to 8 bits."""
EXCUSED = 0.1
"""Of all tokens, at most."""


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


def triton(path: Path, sequences: int, tokens: int, *, split: bool) -> ModelSteps:
    kernels = assembled({"triton": triton_operations(Chip.H100)}, "triton")
    steps = ModelSteps.load(path, kernels, BF16, sequences=sequences, most_tokens=tokens)
    steps.runner._activation_dtype = BF16
    if split:
        config, checkpoint = ModelConfig.load(path), Checkpoint.open(path)
        banks = [ExpertBank.load(checkpoint, config, own, kernels, BF16, CPU) for own in shard_experts(config, 2)]
        steps.dispatcher = Split(tuple(banks))  # type: ignore[assignment]
    return steps


def chosen_and_margins(
    path: Path, kernels: Kernels, prompts: list[list[int]], count: int
) -> tuple[list[list[int]], list[Tensor]]:
    """The references' next tokens of each prompt, and their logits [S, V] at each of them."""
    steps = ModelSteps.load(path, kernels, BF16, sequences=len(prompts), most_tokens=len(prompts[0]) + count)
    logits = [torch.stack([row[-1] for row in steps.step({}, dict(enumerate(prompts))).values()])]
    answers = [logits[0].argmax(-1).tolist()]
    while len(answers) < count:
        found = steps.step({i: [token] for i, token in enumerate(answers[-1])}, {})
        logits.append(torch.stack([row[-1] for row in found.values()]))
        answers.append(logits[-1].argmax(-1).tolist())
    return answers, logits


@pytest.mark.parametrize(
    ("prompts", "length", "count", "layers"),
    [
        pytest.param(1, 9, 3, ["linear_attention", "full_attention"], id="one of each kind"),
        pytest.param(8, 24, 12, SMALL_CONFIG, id="whole", marks=[pytest.mark.verify, pytest.mark.timeout(600)]),
    ],
)
def test_tokens_in_bf16(
    prompts: int, length: int, count: int, layers: list[str], tmp_path: Path, record_result: Callable[..., None]
) -> None:
    changes = {"num_hidden_layers": len(layers), "layer_types": layers} if isinstance(layers, list) else {}
    write_random_checkpoint(tmp_path, SMALL_CONFIG | changes, seed=5, tokenizer=False)
    generator = torch.Generator().manual_seed(7)
    texts = [torch.randint(1280, (length,), generator=generator).tolist() for _ in range(prompts)]
    expected, exact = chosen_and_margins(tmp_path, select_kernels(CPU, "reference"), texts, count)
    found = {}
    for split in (False, True):
        steps = triton(tmp_path, prompts, length + count, split=split)
        rows = steps.step({}, dict(enumerate(texts)), last_only=True)
        told = [torch.stack([row[-1] for row in rows.values()])]
        for tokens in expected[:-1]:
            rows = steps.step({i: [token] for i, token in enumerate(tokens)}, {})
            told.append(torch.stack([row[-1] for row in rows.values()]))
        found[split] = told
    assert all(map(torch.equal, found[False], found[True])), "a split model has the bits of one that is not"
    excused = 0
    for logits, truth in zip(found[False], exact, strict=True):
        ours, best = logits.argmax(-1), truth.max(-1).values
        margins = best - truth.gather(-1, ours[:, None])[:, 0]
        assert (margins <= MARGIN).all(), f"seed 5 and 7: {margins.max().item():.3f} worse in the references' eyes"
        excused += int((margins > 0).sum())
    worst = max((a - b).abs().max().item() for a, b in zip(found[False], exact, strict=True))
    record_result("tokens, excused, largest deviation of a logit", f"{prompts * count}, {excused}, {worst:.3f}")
    print(f"{prompts * count} tokens, {excused} excused, logits within {worst:.3f}")
    assert excused <= max(EXCUSED * prompts * count, 1)
