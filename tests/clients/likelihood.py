"""Log-likelihoods of the choices in the lm-eval task: as lm-eval logged them, and as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Choice = tuple[str, str]
"""Context and continuation."""


def choices(data: Path) -> list[Choice]:
    """The pairs that a multiple-choice task makes of its data file."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [(row["question"], f" {choice}") for row in rows for choice in row["choices"]]


def likelihoods(samples: Path) -> dict[Choice, float]:
    """What lm-eval logged for each pair."""
    found = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for arguments, responses in zip(sample["arguments"].values(), sample["resps"], strict=True):
            found[arguments["arg_0"], arguments["arg_1"]] = float(responses[0][0])
    return found


def oracle(model_dir: Path, pairs: list[Choice]) -> dict[Choice, float]:
    """The same from transformers in fp32, one pair at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {}
    for context, continuation in pairs:
        whole = tokenizer(context + continuation, return_tensors="pt").input_ids
        begin = len(tokenizer(context).input_ids)
        with torch.inference_mode():
            logprobs_TV = model(whole).logits[0].log_softmax(-1)
        found[context, continuation] = sum(
            logprobs_TV[position - 1, whole[0, position]].item() for position in range(begin, whole.shape[1])
        )
    return found
