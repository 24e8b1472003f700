"""The engine with requests whose rules and grammars shape their answers."""

from __future__ import annotations

import ctypes
import json
import random
import re
from collections import defaultdict
from dataclasses import replace
from itertools import count
from threading import Event
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLExecutor, LLParserLimits

from divisi.cluster.engine import grammar as grammar_module
from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Grammars, Guide
from divisi.cluster.engine.plan import StepPlan
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.errors import RequestRejected, StepAborted
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch
from tests.support.fake_runner import VOCAB, FailingDispatcher, FakeRunner, PlainDispatcher, solo_answer
from tests.support.tiny_grammar import EOS, TOKENS, grammars, regex, schema, spell, vocabulary

MAX_LEN = 300

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


class WaitingEngine(Engine):
    """An engine and what the loop around it does while grammars are compiled and nothing else is to do: wait."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.woken = Event()
        super().__init__(*arguments, wake=self.woken.set, **options)

    def next_plan(self) -> StepPlan | None:
        while (plan := self.plan()) is None and self.stats().waiting:
            assert self.woken.wait(30)
            self.woken.clear()
        return plan


def make(source: Grammars | None, **changes: Any) -> WaitingEngine:
    sizes = {"vocab_size": VOCAB, "max_model_len": MAX_LEN, "num_pages": 400, "page_size": 4, "num_slots": 11}
    limits = {"max_seqs": 8, "max_step_tokens": 24}
    config = SchedulerConfig(**{**sizes, **limits, **changes})
    runner = FakeRunner(num_pages=config.num_pages, page_size=config.page_size, num_slots=config.num_slots)
    scheduler = Scheduler(config)
    device = torch.device("cpu")
    return WaitingEngine(runner, Sampler(), scheduler, device=device, stopwatch=Stopwatch(), grammars=source)


def request(name: str, grammar: str | None = None, **changes: Any) -> Request:
    sampling = Sampling(**({"seed": len(name) * 31 + ord(name[-1])} | changes.pop("sampling", {})))
    prompt = tuple((ord(character) * 5 + index) % VOCAB for index, character in enumerate(name * 3))
    more = {"max_tokens": 40, "stop_ids": frozenset({EOS})} | changes
    return Request(name, prompt, sampling=sampling, grammar=grammar, **more)


def serve(
    engine: WaitingEngine, requests: list[Request], failures: random.Random | None = None
) -> dict[str, list[TokenEvent]]:
    """The events of each request; steps fail at random, more than once."""
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for each in requests:
        engine.submit(each)
    while (plan := engine.next_plan()) is not None:
        while failures is not None and failures.random() < 0.3:
            with pytest.raises(StepAborted):
                engine.run(plan, FailingDispatcher(failures.randint(0, 1)))
        for event in engine.run(plan, PlainDispatcher()):
            events[event.request_id].append(event)
    for event in engine.take_events():
        events[event.request_id].append(event)
    for name, found in events.items():
        assert [event.finish_reason is not None for event in found] == [False] * (len(found) - 1) + [True], name
    return events


def answer(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


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


def test_a_grammar_that_fails_ends_its_request_and_no_other() -> None:
    source = grammars(LLParserLimits(step_max_items=60, verbose_errors=False))
    requests = [
        request("ambiguous", 'start: list\nlist: "a" | list list\n', sampling={"logit_bias": ((EOS, -100.0),)}),
        request("unreadable", regex("(a")),
        request("plain"),
        request("guided", regex("[ab]{12}")),
    ]
    engine = make(source)
    events = serve(engine, requests, random.Random(3))
    for name in ("ambiguous", "unreadable"):
        assert events[name][-1].finish_reason == "rejected"
    assert "grammar cannot be followed" in str(events["ambiguous"][-1].error)
    assert len(events["unreadable"]) == 1
    assert set(answer(events["ambiguous"])) == {TOKENS.index("a")}
    assert answer(events["plain"]) == solo_answer(requests[2], MAX_LEN)
    assert re.fullmatch("[ab]{12}", spell(answer(events["guided"])))
    assert engine.stats().free_pages == engine.stats().total_pages


class HeldGrammars(Grammars):
    """Compiles `held` grammars only when they are let go."""

    def __init__(self, **options: Any) -> None:
        super().__init__(vocabulary, VOCAB, **options)
        self.begun, self.let_go = Event(), Event()

    def _compile(self, grammar: str) -> Guide:
        if "held" in grammar:
            self.begun.set()
            assert self.let_go.wait(30)
            grammar = regex("a{3}")
        return super()._compile(grammar)


def test_nobody_waits_for_a_grammar_that_compiles_slowly() -> None:
    source = HeldGrammars()
    engine = make(source)
    engine.submit(request("slow", "held"))
    assert source.begun.wait(30)
    assert engine.plan() is None, "and it returns at once"
    requests = [request("free"), request("guided", regex("[ab]{5}"))]
    for each in requests:
        engine.submit(each)
    ended = []
    while len(ended) < 2:
        plan = engine.plan()
        if plan is None:
            assert engine.woken.wait(30)
            engine.woken.clear()
            continue
        ended += [event.request_id for event in engine.run(plan, PlainDispatcher()) if event.finish_reason]
    assert sorted(ended) == ["free", "guided"]
    source.let_go.set()
    assert spell(answer(serve(engine, [])["slow"])) == "aaa"


def test_a_grammar_that_compiles_for_too_long_ends_its_request_only() -> None:
    source = HeldGrammars(compile_s=0.05)
    engine = make(source)
    events = serve(engine, [request("slow", "held"), request("free")])
    last = events["slow"][-1]
    assert (last.finish_reason, len(events["slow"])) == ("rejected", 1)
    assert "longer to compile than 0.05 s" in str(last.error)
    assert answer(events["free"]) == solo_answer(request("free"), MAX_LEN)
    source.let_go.set()


def test_requests_behind_slow_grammars_are_told_to_come_again() -> None:
    source = HeldGrammars(compile_s=0.2)
    requests = [request(f"{index}", "held") for index in range(3)]
    events = serve(make(source), requests)
    assert [events[each.request_id][-1].finish_reason for each in requests] == ["rejected", "rejected", "cancelled"]
    source.let_go.set()


class Panic(BaseException):
    """As a panic of Rust code arrives: no Exception."""


@pytest.mark.parametrize("error", [Panic("explicit panic"), RuntimeError("Already borrowed"), MemoryError()])
@pytest.mark.parametrize("place", ["compile", "compute", "consume", "is_accepting"])
def test_an_exception_of_the_library_ends_its_request_and_no_other(
    monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException
) -> None:
    class Failing:
        """Stands for the library's matcher of one grammar."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            if place == "compile":
                raise error

        def is_error(self) -> bool:
            return False

        def is_accepting(self) -> bool:
            raise error

        def consume_tokens(self, tokens: list[int]) -> bool:
            raise error

    real = grammar_module.LLMatcher
    compute = LLExecutor.unsafe_compute_mask_ptr

    def make_matcher(tokenizer: Any, grammar: str, **options: Any) -> Any:
        return Failing() if "failing" in grammar else real(tokenizer, grammar, **options)

    class Executor:
        def __init__(self, threads: int) -> None:
            self._real = LLExecutor(threads)

        def unsafe_compute_mask_ptr(self, able: list[Any], pointer: int, size: int, count: int) -> None:
            if any(isinstance(matcher, Failing) for matcher, _ in able):
                if place == "compute":
                    raise error
                for _, row in able:  # every token
                    ctypes.memset(pointer + row * size, 0xFF, size)
                able = [pair for pair in able if not isinstance(pair[0], Failing)]
            if able:
                compute(self._real, able, pointer, size, count)

    monkeypatch.setattr(grammar_module, "LLMatcher", make_matcher)
    monkeypatch.setattr(grammar_module, "LLExecutor", Executor)
    requests = [request("bad", "failing"), request("guided", regex("[ab]{12}")), request("free")]
    engine = make(grammars())
    events = serve(engine, requests)
    assert events["bad"][-1].finish_reason == "error"
    assert "the grammar library failed" in str(events["bad"][-1].error)
    assert re.fullmatch("[ab]{12}", spell(answer(events["guided"])))
    assert answer(events["free"]) == solo_answer(requests[2], MAX_LEN)
    assert engine.stats().free_pages == engine.stats().total_pages


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


def test_a_request_can_be_cancelled_or_fail_while_its_grammar_is_compiled() -> None:
    source = grammars()
    engine = make(source)
    engine.submit(request("a", regex("a")))
    engine.submit(request("b", regex("b")))
    with pytest.raises(RequestRejected, match="already being served"):
        engine.submit(request("a"))
    assert engine.stats().waiting == 2
    engine.cancel("a")
    engine.fail_all("gone")
    assert [(e.request_id, e.finish_reason, e.error) for e in engine.take_events()] == [
        ("a", "cancelled", None),
        ("b", "error", "gone"),
    ]
    assert engine.plan() is None


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
