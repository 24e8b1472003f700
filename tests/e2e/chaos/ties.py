"""Whether a model could as well have gone another way: transformers' own model as the judge of close calls."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.checkouts.compare import margin
from tests.e2e.chaos.judge import Difference
from tests.e2e.chaos.reading import Answer
from tests.parity.oracle import MARGIN


class Ties:
    """Implements `judge.Undecided` for greedy answers; how close a drawn token was is not known here."""

    def __init__(self, model_dir: Path, greedy: Collection[str]) -> None:
        """`greedy` are the names of the asks."""
        self._model_dir, self._greedy = model_dir, greedy

    @cached_property
    def _model(self) -> Qwen3NextForCausalLM:
        return Qwen3NextForCausalLM.from_pretrained(self._model_dir, dtype=torch.float32).eval()

    def __call__(self, reference: Answer, found: Difference) -> bool:
        """By the two best tokens, and the router's choice, at the position where they part."""
        tokens = reference.choices[found.choice].tokens
        if reference.ask not in self._greedy or found.token is None or found.token >= len(tokens):
            return False
        return margin(self._model, [*reference.prompt, *tokens[: found.token]]) < MARGIN
