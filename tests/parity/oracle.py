"""transformers' Qwen3NextForCausalLM as the judge: log-probabilities, greedy tokens, and how sure it was of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.checkouts.compare import margin

MARGIN = 1e-4
"""Below this gap the oracle's own choice is a coin toss, in fp32, between two orders of summation."""


class Oracle:
    def __init__(self, model: Qwen3NextForCausalLM) -> None:
        self.model = model
        self._answers: dict[tuple[int, ...], list[int]] = {}

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [T, V] of what follows each token."""
        return torch.log_softmax(self.model(torch.tensor([list(tokens)])).logits[0].float(), -1)

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` likeliest next tokens, one after the other, with transformers' own cache. Answers are kept."""
        known = self._answers.get(tuple(prompt), [])
        if len(known) < count:
            known = self._answers[tuple(prompt)] = self._generate(prompt, count)
        return known[:count]

    def _generate(self, prompt: Sequence[int], count: int) -> list[int]:
        step = self.model(torch.tensor([list(prompt)]), use_cache=True)
        tokens = [int(step.logits[0, -1].argmax())]
        while len(tokens) < count:
            step = self.model(torch.tensor([tokens[-1:]]), past_key_values=step.past_key_values, use_cache=True)
            tokens.append(int(step.logits[0, -1].argmax()))
        return tokens

    def margin(self, tokens: Sequence[int]) -> float:
        """How close a call the token after ``tokens`` is: of the two best, or of the router's last two."""
        return margin(self.model, tokens)


class Excuses:
    """Counts comparisons, and those that only pass since the oracle itself was undecided.

    The fixture `excuses` is the one object of a session, so that the limit holds over all its comparisons together.
    """

    LIMIT = 0.01

    def __init__(self) -> None:
        self.cases = 0
        self.used: list[str] = []

    def expect_same(
        self, oracle: Oracle, prompt: Sequence[int], expected: Sequence[int], actual: Sequence[int], what: str
    ) -> None:
        """Assert that two greedy continuations agree, or part where the oracle's margin is below MARGIN."""
        self.cases += 1
        if list(expected) == list(actual):
            return
        assert len(expected) == len(actual), f"{what}: {len(actual)} tokens, expected {len(expected)}"
        at = next(i for i, pair in enumerate(zip(expected, actual, strict=True)) if pair[0] != pair[1])
        margin = oracle.margin([*prompt, *expected[:at]])
        assert margin < MARGIN, f"{what}: token {at} is {actual[at]}, expected {expected[at]}, margin {margin:.2e}"
        self.used.append(f"{what}: token {at}, margin {margin:.1e}")
        print(f"undecided oracle, accepted: {self.used[-1]}")

    def expect_few(self) -> None:
        """Assert that at most one comparison in a hundred was excused, or one in all where they are fewer."""
        assert len(self.used) <= self.LIMIT * max(self.cases, 100), f"{len(self.used)} of {self.cases}: {self.used}"
