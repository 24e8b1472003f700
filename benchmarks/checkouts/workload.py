"""Seeded requests that between them use every field of a request: rules, grammars, several choices, cancellations.

Plain data, as JSON: each checkout makes requests of its own classes from it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable
from typing import Any

from llguidance import LLMatcher

Spec = dict[str, Any]

_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"enum": ["yes", "no", 12, None]},
    {"type": "integer", "minimum": -20, "maximum": 1200},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"type": "number", "minimum": 0}},
        "required": ["a"],
        "additionalProperties": False,
    },
)
_PATTERNS = (r"[a-z]{2,20}( [a-z]{1,9}){0,4}\.", r"(ab|cd)*[0-9]{3,30}")
_LENGTHS = (1, 2, 7, 8, 9, 16, 31, 40, 47, 48, 49, 64, 65, 90, 130, 200)
"""Of prompts; whole pages and not, one chunk and several, below and above where the CPU changes its path."""


class Workload:
    """Draws requests. `fields` are those that both checkouts know; others are left out."""

    def __init__(self, vocabulary: int, fields: Collection[str], seed: int) -> None:
        self._vocabulary, self._fields, self._seed = vocabulary, fields, seed

    def requests(self, count: int, plain: bool = False) -> list[Spec]:
        """`count` requests, in some of which are up to four choices, each of which is an entry of the list.

        With `plain` all are greedy, and nothing but the logits decides a token.
        """
        return [spec for index in range(count) for spec in self._choices(index, plain)]

    def _choices(self, index: int, plain: bool) -> list[Spec]:
        rng = random.Random(f"{self._seed} {index}")
        base = self._kept(self._plain_request(rng))
        if not plain:
            base |= self._kept(self._rules(rng, base))
        sampling = {"temperature": 0.0} if plain else self._kept(self._sampling(rng))
        arrives, doomed = index // 3, rng.random() < 0.15
        choices = []
        for choice in range(rng.choice((2, 3, 4)) if rng.random() < 0.12 else 1):
            own = sampling | ({"seed": (sampling["seed"] + choice) % 2**64} if "seed" in sampling else {})
            request = base | {"request_id": f"{index}-{choice}", "sampling": own}
            cancel_after = rng.choice((0, 1, 3, 10)) if doomed else None
            choices.append({"group": index, "arrives": arrives, "cancel_after": cancel_after, "request": request})
        return choices

    def _plain_request(self, rng: random.Random) -> Spec:
        """What is asked for, and what is told of it; without what changes the choice of a token."""
        prompt = [rng.randrange(10, self._vocabulary) for _ in range(rng.choice(_LENGTHS))]
        request: Spec = {"prompt": prompt, "max_tokens": rng.choice((1, 2, 8, 20, 30, 40, 60))}
        if rng.random() < 0.3:
            request["stop_ids"] = self._some_ids(rng, 40)
        if rng.random() < 0.3:
            request["logprobs"] = rng.choice((0, 2, 5))
        if rng.random() < 0.1:
            request["prompt_logprobs"] = rng.choice((0, 3))
            request["max_tokens"] = rng.choice((0, 1, 12))
        if rng.random() < 0.2:
            begin, end = rng.sample(range(self._vocabulary), 2)
            request["content_stop_ids"] = self._some_ids(rng, 40)
            request["spans"] = [{"begin": begin, "end": end, "opened": rng.random() < 0.5}]
        if rng.random() < 0.2:
            request["max_draft_tokens"] = rng.choice((0, 1, 3))
        if rng.random() < 0.15:
            request["answered"] = [rng.randrange(10, self._vocabulary) for _ in range(rng.choice((1, 3, 12)))]
            request["arrived"] = -float(rng.randrange(100))
        return request

    def _rules(self, rng: random.Random, request: Spec) -> Spec:
        rules: Spec = {}
        if rng.random() < 0.2:
            rules["grammar"] = _grammar(rng)
        if rng.random() < 0.2 and request["max_tokens"]:
            rules["min_tokens"] = rng.randint(1, request["max_tokens"])
        return rules

    def _sampling(self, rng: random.Random) -> Spec:
        """Each field is off most of the time, so that there are few, many and no neighbours."""
        draws: dict[str, tuple[float, Callable[[], Any]]] = {
            "top_k": (0.3, lambda: rng.choice((1, 2, 20, 5000))),
            "top_p": (0.3, lambda: rng.choice((0.0, 0.3, 0.9, 0.999))),
            "min_p": (0.2, lambda: rng.choice((0.01, 0.2, 1.0))),
            "repetition_penalty": (0.2, lambda: rng.choice((0.5, 1.1, 1.8))),
            "presence_penalty": (0.2, lambda: rng.choice((-1.0, 0.6, 2.0))),
            "frequency_penalty": (0.2, lambda: rng.choice((-0.5, 0.3, 1.5))),
            "logit_bias": (0.2, lambda: [[token, rng.choice((-100.0, -2.0, 3.0))] for token in self._some_ids(rng, 9)]),
            "allowed_token_ids": (0.1, lambda: self._some_ids(rng, 60)),
            "bad_words": (0.2, lambda: [self._some_ids(rng, 3) for _ in range(rng.randint(1, 30))]),
        }
        sampling = {name: draw() for name, (chance, draw) in draws.items() if rng.random() < chance}
        if sampling.get("allowed_token_ids") and rng.random() < 0.3:
            sampling["bad_words"] = [[token] for token in sampling["allowed_token_ids"]]  # leaves no token
        return sampling | {"temperature": rng.choice((0.0, 0.0, 0.4, 1.0, 1.7)), "seed": rng.getrandbits(64)}

    def _some_ids(self, rng: random.Random, most: int) -> list[int]:
        return sorted({rng.randrange(self._vocabulary) for _ in range(rng.randint(1, most))})

    def _kept(self, values: Spec) -> Spec:
        return {name: value for name, value in values.items() if name in self._fields}


def unused_fields(fields: Iterable[str], requests: Iterable[Spec]) -> list[str]:
    """Those of `fields` that no request sets; a field that the workload doesn't know yet is among them."""
    used = {"request_id", "sampling", "slice", "trace"}  # the last two are for telemetry and decide nothing
    for spec in requests:
        used |= spec["request"].keys() | spec["request"]["sampling"].keys()
    return sorted(set(fields) - used)


def _grammar(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return LLMatcher.grammar_from_regex(rng.choice(_PATTERNS))
    schema = rng.choice(_SCHEMAS) | {"x-guidance": {"whitespace_flexible": False}}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))
