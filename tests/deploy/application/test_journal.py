"""The journal of an answer: what goes out again, what is dropped, what is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

from divisi.cluster.errors import AnswerLost, WorkerLeft, WorkerLost
from divisi.cluster.request import Request, Sampling, TokenEvent, TokenLogprob
from divisi.deploy.application.journal import MAX_DEATHS, Journal

REQUEST = Request("r", (1, 2, 3), 9, Sampling(seed=4), frozenset({0}), logprobs=1, prompt_logprobs=1, arrived=5.0)
LOST, LEFT = WorkerLost("gone"), WorkerLeft("gone")


def told(*token_ids: int, index: int, name: str = "r", **fields: object) -> TokenEvent:
    logprobs = tuple(TokenLogprob(token_id, -1.0, ()) for token_id in token_ids)
    return TokenEvent(name, token_ids, logprobs, index=index, **fields)  # type: ignore[arg-type]


def test_what_an_undisturbed_worker_tells_is_left_as_it_is() -> None:
    journal = Journal(REQUEST)
    assert journal.attempt() is REQUEST
    events = [told(7, index=0, prompt_logprobs=(None,)), told(8, 9, index=1), told(index=3, finish_reason="stop")]
    taken = journal.take(events)
    assert all(found is event for found, event in zip(taken, events, strict=True))


def test_the_next_attempt_is_the_request_with_what_has_come() -> None:
    journal = Journal(REQUEST)
    assert journal.interrupted(LOST) == 3
    assert journal.attempt() == replace(REQUEST, request_id="r#1"), "nothing was told: the prompt's are asked for again"
    journal.take([told(7, 8, index=0, name="r#1", prompt_logprobs=(None,))])
    assert journal.interrupted(LEFT) == 5
    assert journal.attempt() == replace(REQUEST, request_id="r#2", answered=(7, 8), prompt_logprobs=None)
    (event,) = journal.take([told(9, index=2, name="r#2", finish_reason="length")])
    assert event == told(9, index=2, finish_reason="length")


def test_what_has_come_is_dropped_by_its_index() -> None:
    journal = Journal(REQUEST)
    journal.take([told(7, 8, index=0)])
    assert journal.take([told(7, index=0), told(8, 9, index=1), told(7, 8, 9, 5, index=0, finish_reason="stop")]) == [
        told(9, index=2),
        told(5, index=3, finish_reason="stop"),
    ]
    assert journal.take([told(9, 5, index=2, finish_reason="stop")]) == [told(index=4, finish_reason="stop")]


@pytest.mark.parametrize("event", [told(9, index=3), told(index=3, finish_reason="length")])
def test_a_hole_is_an_error(event: TokenEvent) -> None:
    journal = Journal(REQUEST)
    journal.take([told(7, 8, index=0)])
    with pytest.raises(AnswerLost, match="1 tokens of the answer are missing after the first 2"):
        journal.take([event])


def test_what_was_drafted_counts_for_all_attempts_together() -> None:
    journal = Journal(REQUEST)
    journal.take([told(7, 8, index=0, drafted=4, accepted=1)])
    journal.interrupted(LOST)
    (event,) = journal.take([told(9, index=2, drafted=2, accepted=2)])
    assert (event.drafted, event.accepted) == (6, 3)
    journal.interrupted(LOST)
    (event,) = journal.take([told(5, index=3)])
    assert (event.drafted, event.accepted) == (6, 3)


def test_deaths_count_while_nothing_new_comes() -> None:
    journal = Journal(REQUEST)
    for _ in range(3):
        for _ in range(MAX_DEATHS):
            journal.interrupted(LOST)
        journal.take([told(7, index=len(journal.attempt().answered))])
    for _ in range(MAX_DEATHS):
        journal.interrupted(LOST)
        journal.interrupted(LEFT)
    journal.take([told(7, index=0)])
    with pytest.raises(AnswerLost, match="4 attention workers in a row"):
        journal.interrupted(LOST)


def test_who_never_had_a_token_lets_the_others_go_first() -> None:
    newcomer, other = Journal(REQUEST), Journal(REQUEST)
    other.take([told(7, index=0)])
    for journal in (newcomer, other):
        journal.interrupted(LOST)
        assert journal.stand_back_s == 0.0
        journal.interrupted(LOST)
    assert newcomer.stand_back_s > 0.0 == other.stand_back_s
