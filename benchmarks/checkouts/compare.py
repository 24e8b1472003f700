"""Compares what two checkouts answered, request by request: to the bit, or by a margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers import Qwen3NextForCausalLM

from divisi.benchmarks.checkouts.workload import Spec

Answer = Mapping[str, Any]
_PARTS = ("tokens", "logprobs", "prompt logprobs", "finish reason", "stop id", "error")
_LOGPROB_TOLERANCE = 1e-3
"""What the parity tests allow, in fp32."""
_MOST_EXCUSED = 0.01
"""Of all requests, or of a hundred where there are fewer."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing in which two answers to a request differ."""

    request_id: str
    seed: int | None
    part: str
    """Which part of the answer."""
    position: int | None
    """Where in it; None if it has no positions."""
    before: object
    after: object

    def __str__(self) -> str:
        at = "" if self.position is None else f" {self.position}"
        return f"{self.request_id}: {self.part}{at} is {self.before} before and {self.after} after"


class MarginRule:
    """Excuses two greedy answers that part where the model itself, run by transformers in fp32, is undecided."""

    def __init__(self, bound: float, model_dir: Path) -> None:
        self._bound = bound
        self._model = Qwen3NextForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def excuses(self, prompt: Sequence[int], answer: Sequence[int], difference: Difference) -> bool:
        """Whether the first different token of an answer is a close call."""
        return margin(self._model, [*prompt, *answer[: difference.position]]) < self._bound


@torch.no_grad()
def margin(model: Qwen3NextForCausalLM, tokens: Sequence[int]) -> float:
    """How close a call the token after ``tokens`` is: the least of its top-2 logit gap and, over the layers, of the
    router's gap between its k-th and next expert at that position."""
    gaps: list[float] = []
    k = model.config.num_experts_per_tok

    def watch(_module: torch.nn.Module, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        probabilities = torch.softmax(output[0].float(), -1)[-1].sort(descending=True).values
        if k < len(probabilities):
            gaps.append(float(probabilities[k - 1] - probabilities[k]))

    routers = [module for name, module in model.named_modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    try:
        logits = model(torch.tensor([list(tokens)])).logits[0, -1].float()
    finally:
        for hook in hooks:
            hook.remove()
    best = logits.topk(2).values
    return min(float(best[0] - best[1]), *gaps) if gaps else float(best[0] - best[1])


@dataclass(slots=True)
class Comparison:
    """What a comparison of all requests found."""

    differences: list[Difference] = field(default_factory=list)
    """In the order of the requests, one of each."""
    excused: int = 0

    @classmethod
    def of(
        cls,
        requests: Sequence[Spec],
        before: Mapping[str, Answer],
        after: Mapping[str, Answer],
        rule: MarginRule | None,
    ) -> Self:
        """Compare the answers to `requests`, which are by request id; to the bit where there is no rule."""
        found = cls()
        tolerance = 0.0 if rule is None else _LOGPROB_TOLERANCE
        for spec in requests:
            request = spec["request"]
            one, other = before[request["request_id"]], after[request["request_id"]]
            difference = _first_difference(request, one, other, tolerance)
            if difference is None:
                continue
            if rule and difference.part == "tokens" and rule.excuses(request["prompt"], one["tokens"], difference):
                found.excused += 1
            else:
                found.differences.append(difference)
        if found.excused > _MOST_EXCUSED * max(len(requests), 100):
            found.differences.append(Difference("too many", None, "excused", None, 0, found.excused))
        return found

    def __str__(self) -> str:
        if self.differences:
            return f"{len(self.differences)} DIFFERENT"
        return f"same, {self.excused} excused" if self.excused else "identical"


def _first_difference(request: Spec, before: Answer, after: Answer, tolerance: float) -> Difference | None:
    for part in _PARTS:
        found = _compare(part, before[part], after[part], tolerance)
        if found is not None:
            return Difference(request["request_id"], request["sampling"].get("seed"), part, *found)
    return None


def _compare(part: str, before: Any, after: Any, tolerance: float) -> tuple[int | None, object, object] | None:
    """The first difference, or None: its position, and what is there."""
    if not isinstance(before, list) or not isinstance(after, list):
        return None if before == after else (None, before, after)
    for position, (one, other) in enumerate(zip(before, after, strict=False)):
        if one != other and not (part.endswith("logprobs") and _close(one, other, tolerance)):
            return position, one, other
    return None if len(before) == len(after) else (min(len(before), len(after)), len(before), len(after))


def _close(before: Any, after: Any, tolerance: float) -> bool:
    """Whether two records tell the same token with nearly the same numbers; of the best besides, the numbers only."""
    if before is None or after is None or before[0] != after[0] or len(before[2]) != len(after[2]):
        return False
    numbers = [[record[1], *(value for _, value in record[2])] for record in (before, after)]
    return all(abs(one - other) <= tolerance for one, other in zip(*numbers, strict=True))
