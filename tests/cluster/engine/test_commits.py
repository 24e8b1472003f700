"""What a committed step makes of its sequences: tokens, ends, and who was cancelled meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from divisi.cluster.engine.step.plan import Outcome
from divisi.cluster.triggers import Span
from tests.cluster.engine.scheduling import (
    CALL,
    CALLED,
    EOS,
    STOP,
    THINK,
    THOUGHT,
    assert_all_free,
    chosen,
    drain,
    make,
    request,
    step,
)


def test_cancel_frees_at_once_or_with_the_step_under_way() -> None:
    scheduler = make(max_seqs=2)
    for name in "abc":
        scheduler.submit(request(name))
    step(scheduler)
    for name in "ac":
        outcome = scheduler.cancel(name)
        assert outcome is not None
        assert outcome.finish_reason == "cancelled"
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.cancel("b") is None
    assert scheduler.running
    outcomes = scheduler.commit(plan, chosen(plan))
    assert [(outcome.finish_reason, outcome.token_ids) for outcome in outcomes] == [("cancelled", ())]
    assert scheduler.cancel("b") is None
    assert_all_free(scheduler)


@pytest.mark.parametrize(
    ("tokens", "told", "length", "end"),
    [
        ([21, 22, 23], (21, 22, 23), 8, None),
        ([21, 22], (21, 22), 7, None),
        ([21, STOP, 23], (21,), None, "stop"),
        ([21, 22, 23, 24], (21, 22, 23), None, "length"),
    ],
)
def test_a_ring_run_of_several_rows_commits_as_many_as_it_chose_tokens(
    tokens: list[int], told: tuple[int, ...], length: int | None, end: str | None
) -> None:
    scheduler = make()
    sequence = scheduler.submit(request("a", max_tokens=4 + (end is None), stop_ids=frozenset({STOP})))
    step(scheduler)
    plan = scheduler.plan()
    assert plan is not None
    wide = replace(plan, rings=(plan.rings[0]._replace(end=sequence.length + 4),), num_rows=4)
    scheduler.outstanding = wide
    (outcome,) = scheduler.commit(wide, [tokens])
    assert (outcome.token_ids, outcome.finish_reason) == (told, end)
    if length is None:
        assert_all_free(scheduler)
    else:
        assert (sequence.length, sequence.tokens[5:]) == (length, [1, *told])
        assert len(sequence.tokens) == sequence.length + 1


@pytest.mark.parametrize(
    ("tokens", "told", "end"),
    [
        ([21, STOP, 22], (21, STOP, 22), None),
        ([21, STOP, THOUGHT, STOP, 23], (21, STOP, THOUGHT), "stop"),
        ([THOUGHT, CALL, STOP, CALLED, 24, STOP], (THOUGHT, CALL, STOP, CALLED, 24), "stop"),
        ([STOP, EOS, THOUGHT], (STOP,), "stop"),
        ([THOUGHT, CALL, EOS, CALLED], (THOUGHT, CALL), "stop"),
    ],
    ids=["thinking", "after it", "beside a call", "end in thinking", "end in a call"],
)
@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_named_stop_ids_count_outside_of_spans_however_many_tokens_a_step_commits(
    tokens: list[int], told: tuple[int, ...], end: str | None, at_once: int
) -> None:
    scheduler = make()
    spans = (Span(THINK, THOUGHT, opened=True, leading=True), Span(CALL, CALLED))
    stops = {"stop_ids": frozenset({EOS}), "content_stop_ids": frozenset({STOP})}
    sequence = scheduler.submit(request("a", max_tokens=20, spans=spans, **stops))
    step(scheduler)
    found: list[Outcome] = []
    while tokens and not (found and found[-1].finish_reason):
        plan = scheduler.plan()
        assert plan is not None
        wide = replace(plan, rings=(plan.rings[0]._replace(end=sequence.length + at_once),), num_rows=at_once)
        scheduler.outstanding = wide
        found += scheduler.commit(wide, [tokens[:at_once]])
        tokens = tokens[at_once:]
    assert tuple(token for outcome in found for token in outcome.token_ids) == told
    assert found[-1].finish_reason == end


def test_a_preempted_answer_is_where_it_was() -> None:
    """The first tokens of the answer, which opened a call, are computed again but not taken again."""
    scheduler = make(num_pages=4)
    scheduler.submit(request("first", prompt=5, max_tokens=8))
    spans, stops = (Span(CALL, CALLED),), frozenset({STOP})
    second = scheduler.submit(request("second", prompt=4, max_tokens=8, spans=spans, content_stop_ids=stops))
    step(scheduler, CALL)
    while not scheduler.preemptions:
        step(scheduler, STOP)
    assert second.triggers.inside == spans[0]
    assert drain(scheduler) == {"first": "length", "second": "length"}


@pytest.mark.parametrize("prompt", [5, 30], ids=["last chunk", "first chunk"])
def test_cancel_during_a_chunk(prompt: int) -> None:
    scheduler = make()
    scheduler.submit(request("a", prompt=prompt))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.cancel("a")
    outcomes = scheduler.commit(plan, chosen(plan))
    assert [outcome.finish_reason for outcome in outcomes] == ["cancelled"]
    assert_all_free(scheduler)


def test_a_stop_id_ends_the_answer_and_is_not_in_it() -> None:
    scheduler = make()
    scheduler.submit(request("a", stop_ids=frozenset({STOP})))
    step(scheduler)
    (outcome,) = step(scheduler, STOP)[1]
    assert (outcome.token_ids, outcome.finish_reason, outcome.stop_id) == ((), "stop", STOP)
    assert_all_free(scheduler)


def test_the_context_ends_an_answer_that_max_tokens_does_not() -> None:
    scheduler = make(max_model_len=9)
    sequence = scheduler.submit(request("a", prompt=5, max_tokens=1000))
    assert drain(scheduler) == {"a": "length"}
    assert len(sequence.tokens) == 9


def test_no_tokens_wanted_is_a_prefill_that_samples_nothing() -> None:
    scheduler = make()
    scheduler.submit(request("a", max_tokens=0))
    plan, outcomes = step(scheduler)
    assert not plan.scans[0].chooses
    assert [(outcome.token_ids, outcome.finish_reason) for outcome in outcomes] == [((), "length")]
    assert_all_free(scheduler)
