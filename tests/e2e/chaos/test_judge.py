"""The plan of blows and the judge, without a server: what is right passes, and each kind of wrong is found."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.chaos.asks import asks, stopping
from tests.e2e.chaos.blows import APART_S, KINDS, STOPPED_S, Blow, plan
from tests.e2e.chaos.judge import Struck, Verdict, gap_of, judge
from tests.e2e.chaos.reading import Answer

WORDS = [f"w{number} " for number in range(40)]
USAGE = {"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43}


def lines(start: int = 0, end: int = 40, n: int = 2, **changes: Any) -> list[str]:
    """An event stream of `n` choices, one token an event."""
    found = []
    for at in range(start, end):
        for index in range(n):
            choice = {"index": index, "text": WORDS[at], "token_ids": [at], "finish_reason": None}
            choice["logprobs"] = {"tokens": [WORDS[at]], "token_logprobs": [-0.5]}
            found.append({"choices": [choice | changes.get(str(at), {})], "usage": None})
    found += [{"choices": [{"index": index, "text": "", "finish_reason": "length"}]} for index in range(n)]
    return [f"data: {json.dumps(each)}" for each in (*found, {"choices": [], "usage": changes.get("usage", USAGE)})]


def answer(*said: str, done: bool = True, every_s: float = 0.1, begun: float = 0.0, error: str = "") -> Answer:
    found = Answer("ask", 0, begun=begun)
    for number, line in enumerate([*said, "data: [DONE]"] if done else said, 1):
        found.take(line, begun + number * every_s)
    found.ended, found.error = begun + (len(said) + 1) * every_s, error or found.error
    return found


REFERENCE = answer(*lines())


def verdict_of(*answers: Answer, struck: tuple[Struck, ...] = (), **known: Any) -> Verdict:
    return judge({"ask": REFERENCE}, answers, struck, **known)


def hit(kind: str, begin: float, stopped_s: float | None = None) -> Struck:
    return Struck(Blow(begin, kind, stopped_s, 1, 0.0), begin, begin + (stopped_s or 0.0), 1, 1)


def test_what_is_as_it_would_have_been_passes() -> None:
    verdict = verdict_of(answer(*lines(), every_s=0.3), answer(*lines()))
    assert (verdict.whole, verdict.faults) == (2, [])


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (lines(0, 40, **{"7": {"token_ids": [8]}}), "token 7 is 8, not 7"),
        (lines(0, 40)[:20] + lines(0, 40)[18:], "token 10 is 9"),
        (lines(0, 40)[:20] + lines(0, 40)[22:], "token 10 is 11"),
        (lines(0, 39), "it has 39 tokens, not 40"),
        (lines(**{"7": {"text": "x"}}), "its text is not the reference's"),
        (lines(**{"7": {"logprobs": {"tokens": ["w7 "], "token_logprobs": [-0.6]}}}), "log-probability 7"),
        (lines(usage=USAGE | {"completion_tokens": 39}), "usage is"),
        (lines(n=1), "it has 0 tokens, not 40"),
        ([*lines()[:-1], *lines()[-2:]], "it ends by"),
        (lines(**{"7": {"finish_reason": "stop"}}), "it ends by"),
    ],
    ids=["wrong", "repeated", "missing", "short", "text", "logprob", "usage", "choice", "two ends", "early end"],
)  # fmt: skip
def test_each_kind_of_wrong_answer_is_found(said: list[str], fault: str) -> None:
    (found,) = verdict_of(answer(*said)).faults
    assert fault in found


def test_calls_are_compared() -> None:
    def call(arguments: str) -> Answer:
        delta = {"tool_calls": [{"index": 0, "function": {"name": "note", "arguments": arguments}}]}
        return answer("data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "token_ids": [1]}]}))

    references = {"ask": call('{"a": 1}')}
    assert judge(references, [call('{"a": 1}')], []).faults == []
    assert "its call 0" in judge(references, [call('{"a": 2}')], []).faults[0]


def test_a_broken_stream_needs_a_front_that_was_struck_and_has_to_be_right_so_far() -> None:
    broken = answer(*lines()[:30], done=False, error="RemoteProtocolError: closed")
    assert len(verdict_of(broken).faults) == 1
    assert len(verdict_of(broken, struck=(hit("worker", 3.0),)).faults) == 1
    verdict = verdict_of(broken, struck=(hit("ingress", 3.0),))
    assert (verdict.faults, verdict.prefixes, len(verdict.broken)) == ([], 1, 1)
    assert len(verdict_of(broken, struck=(hit("ingress", 3.2),)).faults) == 1, "it broke before"
    wrong = answer(*lines(**{"7": {"token_ids": [8]}})[:30], done=False, error="RemoteProtocolError: closed")
    assert "token 7" in verdict_of(wrong, struck=(hit("ingress", 3.0),)).faults[0]


def test_an_error_event_is_nobodys_right() -> None:
    event = 'data: {"error": {"code": "answer_lost", "message": "four workers"}}'
    lost = answer(*lines()[:30], event, done=False)
    assert "answer_lost" in verdict_of(lost, struck=(hit("ingress", 3.0), hit("worker", 3.0))).faults[0]


def test_a_refusal_needs_a_gang_that_was_struck() -> None:
    refused = answer(done=False, begun=20.0, error="status 503 gang_not_ready: a seat is empty")
    assert len(verdict_of(refused).faults) == 1
    verdict = verdict_of(refused, struck=(hit("shard", 5.0),))
    assert (verdict.faults, len(verdict.refused)) == ([], 1)
    other = answer(done=False, begun=20.0, error="status 500 internal: ")
    assert len(verdict_of(other, struck=(hit("shard", 19.0),)).faults) == 1


def late(by_s: float) -> Answer:
    """Pauses after the tenth token."""
    found = answer(*lines(n=1, end=40))
    found.times = [at if number < 10 else at + by_s for number, at in enumerate(found.times)]
    found.ended += by_s
    return found


@pytest.mark.parametrize(
    ("gap_s", "struck", "no_workers", "faults", "excused"),
    [
        (9.0, (), (), 0, 0),
        (11.0, (), (), 1, 0),
        (11.0, (hit("worker", 1.0),), (), 1, 0),
        (11.0, (hit("ingress", 1.0, 11.0),), (), 0, 1),
        (11.0, (hit("ingress", 30.0),), (), 1, 0),
        (14.0, (hit("ingress", 2.0),), (), 0, 1),
        (16.0, (hit("ingress", 2.0),), (), 1, 0),
        (16.5, (hit("ingress", 2.0), hit("proxy", 4.0), hit("ingress", 3.0)), (), 0, 1),
        (18.0, (hit("ingress", 2.0), hit("proxy", 4.0), hit("ingress", 3.0)), (), 1, 0),
        (20.0, (), ((2.0, 9.0),), 0, 1),
        (26.0, (), ((2.0, 9.0),), 1, 0),
        (20.0, (), ((40.0, 50.0),), 1, 0),
    ],
)
def test_a_long_gap_needs_an_excuse(
    gap_s: float, struck: tuple[Struck, ...], no_workers: tuple[tuple[float, float], ...], faults: int, excused: int
) -> None:
    verdict = judge({"ask": late(0.0)}, [late(gap_s)], struck, no_workers)
    assert (len(verdict.faults), len(verdict.long_gaps)) == (faults, excused)


def test_few_may_part_at_a_tie() -> None:
    parted = [answer(*lines(**{"7": {"token_ids": [8]}})) for _ in range(3)]
    seen: list[int | None] = []

    def undecided(reference: Answer, found: Any) -> bool:
        seen.append(found.token)
        return reference is REFERENCE

    assert verdict_of(*parted[:2], undecided=undecided).faults == []
    assert len(verdict_of(*parted, undecided=undecided).faults) == 1
    assert seen == [7] * 5


def test_a_gap_belongs_to_the_blow_before_it() -> None:
    answers = [late(4.0), replace(late(2.0), slot=1)]
    assert gap_of(hit("shard", 0.9), answers) == pytest.approx(4.1)
    assert gap_of(hit("shard", 6.0), answers) == pytest.approx(0.1), "it fell after the pause"
    assert gap_of(hit("shard", 90.0), answers) == 0.0, "nothing was open"


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_has_all_kinds_and_both_ways(seed: int) -> None:
    blows = plan(seed, 50)
    assert blows == plan(seed, 50)
    assert blows != plan(seed + 1, 50)
    assert set(Counter(blow.kind for blow in blows).values()) == {8, 9}
    assert sum(blow.stopped_s is None for blow in blows) == 35
    for earlier, later in itertools.pairwise(blows):
        assert APART_S[0] <= later.at_s - earlier.at_s <= APART_S[1]
    assert all(blow.stopped_s is None or STOPPED_S[0] <= blow.stopped_s <= STOPPED_S[1] for blow in blows)
    assert {blow.kind for blow in blows} == set(KINDS)
    assert all(blow.count == 1 for blow in blows if blow.kind in ("coordinator", "gang", "proxy"))


def test_a_stop_string_comes_late_and_once() -> None:
    ask = next(ask for ask in asks(1) if ask.name == "stop 0")
    text = "".join(f"{number} and " for number in range(400))
    (piece,) = stopping(ask, text).body["stop"]
    assert text.find(piece) >= len(text) // 2
    with pytest.raises(ValueError, match="take another seed"):
        stopping(ask, "again and " * 400)
