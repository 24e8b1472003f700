"""The engine with grammars that are slow, broken, or end in the middle of an answer: their requests end, no others."""

from __future__ import annotations

import ctypes
import random
import re
from threading import Event
from typing import Any

import pytest
from llguidance import LLExecutor, LLParserLimits

from divisi.cluster.engine import grammar as grammar_module
from divisi.cluster.engine.grammar import Grammars, Guide
from divisi.cluster.errors import RequestRejected
from tests.support.fake_runner import VOCAB, PlainDispatcher, solo_answer
from tests.support.ruled_engine import MAX_LEN, answer, make, request, serve
from tests.support.tiny_grammar import EOS, TOKENS, grammars, regex, spell, vocabulary


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
    assert str(events["bad"][-1].error).endswith("the grammar library failed"), "what failed inside is for the log"
    assert re.fullmatch("[ab]{12}", spell(answer(events["guided"])))
    assert answer(events["free"]) == solo_answer(requests[2], MAX_LEN)
    assert engine.stats().free_pages == engine.stats().total_pages


def test_a_request_can_be_cancelled_while_its_grammar_is_compiled() -> None:
    source = grammars()
    engine = make(source)
    engine.submit(request("a", regex("a")))
    with pytest.raises(RequestRejected, match="already being served"):
        engine.submit(request("a"))
    assert engine.stats().waiting == 1
    engine.cancel("a")
    assert [(e.request_id, e.finish_reason, e.error) for e in engine.take_events()] == [("a", "cancelled", None)]
    assert engine.plan() is None
