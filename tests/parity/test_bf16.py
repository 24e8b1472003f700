"""bf16 weights: the likeliest tokens agree with the fp32 oracle at least as often as transformers' own bf16 does."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.checkouts.cells import CONFIGS
from divisi.cluster.request import Request, Sampling
from divisi.model.random_checkpoint import write_random_checkpoint
from tests.parity.engines import local_engine
from tests.parity.variants import build_oracle


class Agreement:
    """Likeliest tokens of bf16 weights that are the fp32 oracle's, ours and transformers'."""

    def __init__(self) -> None:
        self.ours, self.theirs, self.total = 0, 0, 0

    def add(self, model: Qwen3NextForCausalLM, path: Path, prompts: list[list[int]]) -> None:
        """Teacher-forced: the answer to each prefix of the prompts. `model` is in bf16 and is turned to fp32."""
        requests = [
            Request(str(i), tuple(prompt), 0, Sampling(temperature=0.0), prompt_logprobs=1)
            for i, prompt in enumerate(prompts)
        ]
        events = local_engine(path, dtype=torch.bfloat16, max_step_tokens=33).run(requests)
        with torch.no_grad():
            ids = torch.tensor(prompts)
            bf16 = model(ids).logits[:, :-1].argmax(-1)
            fp32 = model.float()(ids).logits[:, :-1].argmax(-1)
        for i in range(len(prompts)):
            told = next(event.prompt_logprobs for event in events[str(i)] if event.prompt_logprobs is not None)
            best = torch.tensor([entry.top[0][0] for entry in told[1:] if entry is not None])
            self.ours += int((best == fp32[i]).sum())
        self.theirs += int((bf16 == fp32).sum())
        self.total += fp32.numel()

    def check(self, record_result: Callable[[str, object], None]) -> None:
        """At least as often as transformers'."""
        record_result(
            "agreement with the fp32 oracle", f"{self.ours} of {self.total}; transformers' bf16 {self.theirs}"
        )
        assert self.ours >= self.theirs
        assert self.theirs > self.total / 2, "the oracle's bf16 is too far off to be a yardstick"


def random_prompts(seed: int, count: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(120)] for _ in range(count)]


def test_top_1_agreement(tmp_path: Path, record_result: Callable[[str, object], None]) -> None:
    found = Agreement()
    for variant in ("base", "heads-1to4-interval-3", "odd-head-dims", "top-10-of-12-unnormalised"):
        model = build_oracle(variant, seed=1).bfloat16()
        path = tmp_path / variant
        model.save_pretrained(path)
        found.add(model, path, random_prompts(21, 6, 211))
    found.check(record_result)


@pytest.mark.verify
def test_top_1_agreement_on_bench_s(tmp_path: Path, record_result: Callable[[str, object], None]) -> None:
    config = json.loads((CONFIGS / "bench-s.json").read_text(encoding="utf-8"))
    write_random_checkpoint(tmp_path, config)
    model = Qwen3NextForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    found = Agreement()
    found.add(model, tmp_path, random_prompts(22, 12, config["vocab_size"]))
    found.check(record_result)
