"""bf16 weights: the likeliest tokens agree with the fp32 oracle at least as often as transformers' own bf16 does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from divisi.cluster.request import Request, Sampling
from tests.parity.engines import local_engine
from tests.parity.variants import build_oracle


def test_top_1_agreement(tmp_path: Path, record_result: Callable[[str, object], None]) -> None:
    ours, theirs, total = 0, 0, 0
    for variant in ("base", "heads-1to4-interval-3", "odd-head-dims", "top-10-of-12-unnormalised"):
        model = build_oracle(variant, seed=1).bfloat16()
        path = tmp_path / variant
        model.save_pretrained(path)
        rng = random.Random(21)
        prompts = [[rng.randrange(211) for _ in range(120)] for _ in range(6)]
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
            ours += int((best == fp32[i]).sum())
        theirs += int((bf16 == fp32).sum())
        total += fp32.numel()
    record_result("agreement with the fp32 oracle", f"{ours} of {total}; transformers' bf16 {theirs}")
    assert ours >= theirs
    assert theirs > total / 2, "the oracle's bf16 is too far off to be a yardstick"
