"""The engine with requests whose rules and grammars shape their answers."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import count
from typing import Any

import jsonschema
import pytest

from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request
from tests.support.fake_runner import VOCAB, PlainDispatcher, solo_answer
from tests.support.ruled_engine import MAX_LEN, answer, make, request, serve
from tests.support.tiny_grammar import EOS, grammars, regex, schema, spell

SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["ab", "abc", "x", 12, None, True]},
    {"type": "integer", "minimum": -20, "maximum": 1200},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "number", "minimum": 0, "maximum": 9}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "é": {"const": "é"},
                    "sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["é"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[ab]{2,6}c$"}]},
]

RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "min_p": 0.02},
    {"temperature": 0.8, "bad_words": ((1, 5), (11,), (12, 13, 14)), "top_p": 0.9},
    {"logit_bias": ((EOS, 4.0), (20, -100.0)), "top_k": 30},
    {"allowed_token_ids": tuple(range(0, VOCAB, 2)), "frequency_penalty": -0.2},
]


def mixed(seed: int) -> list[Request]:
    """Requests with every kind of rule, with and without grammars."""
    numbers = random.Random(seed)
    requests = []
    for index in range(18):
        grammar = schema(SCHEMAS[index % len(SCHEMAS)]) if index % 3 else None
        rules = dict(RULES[index % len(RULES)])
        if grammar is not None:
            rules.pop("allowed_token_ids", None)
            rules.pop("bad_words", None)
        min_tokens = numbers.choice([0, 0, 12])
        sampling = {"seed": numbers.getrandbits(64), **rules}
        name = f"{seed}{index}" + "x" * numbers.randint(1, 6)
        requests.append(request(name, grammar, sampling=sampling, min_tokens=min_tokens, max_tokens=60))
    return requests


@pytest.mark.parametrize("seed", range(3))
def test_rules_give_in_a_batch_what_numpy_gives_alone(seed: int) -> None:
    requests = [each for each in mixed(seed) if each.grammar is None]
    events = serve(make(None), requests)
    for each in requests:
        assert answer(events[each.request_id]) == solo_answer(each, MAX_LEN), each


@pytest.mark.parametrize("seed", range(3))
def test_aborts_and_preemption_change_no_answer_with_rules_or_a_grammar(seed: int) -> None:
    requests, source = mixed(seed), grammars()
    alone = {each.request_id: serve(make(source), [each])[each.request_id] for each in requests}
    crowded = make(source, num_pages=40, num_slots=9)
    events = serve(crowded, requests, random.Random(seed))
    stats = crowded.stats()
    assert stats.preemptions > 0
    assert stats.aborted_steps > 10
    assert stats.free_pages == stats.total_pages
    for each in requests:
        name = each.request_id
        assert answer(events[name]) == answer(alone[name]), each
        assert events[name][-1].finish_reason == alone[name][-1].finish_reason


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_that_ends_conforms_to_its_schema(temperature: float) -> None:
    requests = [
        request(f"{index}-{seed}", schema(each), sampling={"temperature": temperature, "seed": seed}, max_tokens=120)
        for index, each in enumerate(SCHEMAS)
        for seed in range(12)
    ]
    events = serve(make(grammars()), requests)
    ended = 0
    for each in requests:
        found = events[each.request_id]
        text = spell(answer(found))
        assert found[-1].finish_reason in ("stop", "length"), found[-1]
        if found[-1].finish_reason == "stop":
            ended += 1
            assert found[-1].stop_id == EOS
            jsonschema.validate(json.loads(text), SCHEMAS[int(each.request_id.split("-")[0])])
        else:
            assert len(answer(found)) == each.max_tokens
    assert ended > len(requests) * 0.8


def test_a_complete_answer_ends_even_where_the_end_of_the_text_is_ignored_or_too_early() -> None:
    engine = make(grammars())
    requests = [
        request("ignores", regex("[ab]{3}"), stop_ids=frozenset()),
        request("early", regex("[ab]{3}"), min_tokens=10),
        request("late", regex("[ab]{3,9}"), min_tokens=7),
        request("biased", regex("[ab]{3}"), sampling={"logit_bias": ((EOS, -100.0),)}),
        request("short", regex("[ab]{3}"), max_tokens=2),
    ]
    events = serve(engine, requests)
    texts = {name: spell(answer(found)) for name, found in events.items()}
    for name in ("ignores", "early", "biased"):
        assert re.fullmatch("[ab]{3}", texts[name]), texts
        assert events[name][-1].finish_reason == "stop"
    assert re.fullmatch("[ab]{3,9}", texts["late"])
    assert len(answer(events["late"])) >= 7 or len(texts["late"]) == 9
    assert (len(answer(events["short"])), events["short"][-1].finish_reason) == (2, "length")


def test_rules_that_leave_no_token_end_the_answer_with_an_error_that_says_so() -> None:
    sampling = {"allowed_token_ids": (7, 8), "bad_words": ((7, 7), (7, 8), (8, 7), (8, 8))}
    stuck = request("stuck", sampling=sampling, logprobs=1)
    contradiction = request("contradiction", regex("a"), sampling={"allowed_token_ids": (7,)})
    events = serve(make(grammars()), [stuck, contradiction, request("plain")])
    assert len(answer(events["stuck"])) == 1
    for name in ("stuck", "contradiction"):
        assert events[name][-1].finish_reason == "rejected"
        assert "no token is left" in str(events[name][-1].error)
    assert events["stuck"][-1].logprobs == ()
    assert events["plain"][-1].finish_reason in ("stop", "length")


def test_an_engine_without_grammars_says_so() -> None:
    with pytest.raises(RequestRejected, match="cannot follow a grammar"):
        make(None).submit(request("a", regex("a")))


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"allowed_token_ids": (VOCAB,)}, {}, "allowed_token_ids has token ids outside"),
    ({"allowed_token_ids": ()}, {}, "allowed_token_ids is empty"),
    ({"logit_bias": ((-1, 1.0),)}, {}, "logit_bias has token ids outside"),
    ({"logit_bias": ((1, float("nan")),)}, {}, "logit_bias of 1 is nan"),
    ({"bad_words": ((1, 99),)}, {}, "bad_words has token ids outside"),
    ({"bad_words": ((),)}, {}, "bad_words has an empty entry"),
    ({"repetition_penalty": 0.0}, {}, "repetition_penalty is 0"),
    ({"repetition_penalty": 1e-45}, {}, "repetition_penalty is 1e-45"),
    ({"presence_penalty": float("inf")}, {}, "presence_penalty is inf"),
    ({"min_p": 1.5}, {}, "min_p is 1.5"),
    ({"temperature": float("nan")}, {}, "temperature is nan"),
    ({"temperature": 1e300}, {}, "temperature is 1e\\+300"),
    ({"presence_penalty": -1e300}, {}, "presence_penalty is -1e\\+300"),
    ({"top_k": 2**63}, {}, "top_k is 9"),
    ({}, {"min_tokens": 2**63}, "min_tokens is 9"),
    ({}, {"stop_ids": frozenset({VOCAB}), "min_tokens": 1}, "stop_token_ids has token ids outside"),
]


@pytest.mark.parametrize(("sampling", "changes", "message"), BAD)
@pytest.mark.parametrize("grammar", [None, regex("a")], ids=["free", "guided"])
def test_what_would_break_a_step_is_rejected(
    sampling: dict[str, Any], changes: dict[str, Any], message: str, grammar: str | None
) -> None:
    engine = make(grammars())
    with pytest.raises(RequestRejected, match=message):
        engine.submit(request("a", grammar, sampling=sampling, **changes))
    assert engine.plan() is None


def test_unchanged_rows_keep_their_tensors() -> None:
    """While the same sequences decode, nothing is built anew: their parameters are read once."""
    engine = make(None)
    reads = count()

    class Counted(tuple[int, ...]):
        def __iter__(self) -> Any:
            next(reads)
            return super().__iter__()

    sampling = {"allowed_token_ids": Counted(range(1, VOCAB)), "frequency_penalty": 0.4, "bad_words": ((3, 4),)}
    engine.submit(replace(request("a", sampling=sampling, max_tokens=100), stop_ids=frozenset()))
    for _ in range(6):
        plan = engine.plan()
        assert plan is not None
        engine.run(plan, PlainDispatcher())
    before = next(reads)
    for _ in range(50):
        plan = engine.plan()
        assert plan is not None
        engine.run(plan, PlainDispatcher())
    assert next(reads) == before + 1
