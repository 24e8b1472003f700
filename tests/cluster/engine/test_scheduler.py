"""What a step holds: who is let in, decodes and chunks, and what can never be served."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from divisi.cluster.engine.memory.sequence_memory import NOTHING
from divisi.cluster.engine.sequence import Status
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, Sampling
from tests.cluster.engine.scheduling import (
    assert_all_free,
    chosen,
    chunks,
    decodes,
    drain,
    make,
    request,
    step,
)


def test_nothing_to_do_is_no_plan() -> None:
    assert make().plan() is None


def test_prompt_goes_in_chunks_then_one_token_a_step() -> None:
    scheduler = make(max_step_tokens=8)
    scheduler.submit(request("a", prompt=19, max_tokens=2))
    seen = [step(scheduler) for _ in range(4)]
    assert [chunks(plan) for plan, _ in seen] == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 19)], []]
    assert [decodes(plan) for plan, _ in seen] == [[], [], [], ["a"]]
    assert [outcomes for _, outcomes in seen[:2]] == [[], []]
    assert [outcome.token_ids for _, outcomes in seen[2:] for outcome in outcomes] == [(1,), (1,)]
    assert seen[3][1][0].finish_reason == "length"
    assert_all_free(scheduler)


def test_a_prompt_that_is_alone_may_fill_a_step_however_large() -> None:
    scheduler = make(vocab_size=3000, max_step_tokens=3000, max_model_len=3000, num_pages=1000)
    scheduler.submit(request("a", prompt=2500))
    assert chunks(step(scheduler)[0]) == [("a", 0, 2500)]


def test_decodes_come_first_and_chunks_share_the_rest_of_the_budget() -> None:
    scheduler = make(max_step_tokens=10)
    scheduler.submit(request("a", prompt=3, max_tokens=9))
    step(scheduler)
    scheduler.submit(request("b", prompt=6))
    scheduler.submit(request("c", prompt=6))
    plan, _ = step(scheduler)
    assert decodes(plan) == ["a"]
    assert chunks(plan) == [("b", 0, 6), ("c", 0, 3)]
    assert plan.num_rows == 10
    plan, _ = step(scheduler)
    assert decodes(plan) == ["a", "b"]
    assert chunks(plan) == [("c", 3, 6)]


def test_a_scan_leaves_its_state_in_a_spare_and_the_last_one_frees_the_other() -> None:
    scheduler = make(max_step_tokens=8)
    sequence = scheduler.submit(request("a", prompt=12))
    plan = scheduler.plan()
    assert plan is not None
    first, second = sequence.holding.spares
    assert (plan.scans[0].source, plan.scans[0].leaves) == (NOTHING, ((8, first),))
    scheduler.commit(plan, [[]])
    assert (sequence.holding.slot, sequence.holding.spares) == (first, [second])
    assert scheduler.memory.slots.num_free == scheduler.config.num_slots - 2
    plan, _ = step(scheduler)
    assert (plan.scans[0].source, plan.scans[0].leaves) == (first, ((12, second),))
    assert (sequence.holding.slot, sequence.holding.spares) == (second, [])
    assert scheduler.memory.slots.num_free == scheduler.config.num_slots - 1
    assert sequence.status is Status.DECODE


@pytest.mark.parametrize(
    "limit", [{"max_seqs": 2}, {"num_slots": 4}, {"num_pages": 14}], ids=["page tables", "slots", "pages"]
)
def test_admission_waits_for_what_is_missing_in_order(limit: dict[str, int]) -> None:
    scheduler = make(max_step_tokens=60, **limit)
    sequences = [scheduler.submit(request(name, prompt=17, max_tokens=3)) for name in "abc"]
    small = scheduler.submit(request("small", prompt=1, max_tokens=1))
    step(scheduler)
    assert scheduler.running == sequences[:2]
    while sequences[2].status is Status.WAITING:
        assert small.status is Status.WAITING
        step(scheduler)
    drain(scheduler)
    assert_all_free(scheduler)


def test_the_latest_arrival_gives_way_and_keeps_its_tokens() -> None:
    scheduler = make(num_pages=5, page_size=4, max_model_len=20)
    first = scheduler.submit(request("a", prompt=7, max_tokens=12))
    second = scheduler.submit(request("b", prompt=3, max_tokens=12))
    for token in range(20, 40):
        step(scheduler, token)
        if second.status is Status.WAITING:
            break
    assert scheduler.preemptions == 1
    assert first.status is Status.DECODE
    assert second.tokens[:3] == [10, 11, 12]
    kept = len(second.tokens)
    assert kept > 4
    assert (second.length, second.admitted) == (0, None)
    assert drain(scheduler) == {"a": "length", "b": "length"}
    assert len(second.tokens) == 15
    assert second.tokens[3:kept] == list(range(20, 20 + kept - 3))
    assert_all_free(scheduler)


def test_prompt_logprobs_bound_the_rows_of_logits_per_step() -> None:
    scheduler = make(max_prompt_logit_rows=3)
    sequence = scheduler.submit(request("a", prompt=7, prompt_logprobs=0))
    assert sequence.prompt_logprobs is not None
    scheduler.submit(request("b", prompt=7))
    seen = []
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        seen.append(chunks(plan))
        for run in plan.scans:
            if run.sequence is sequence:
                assert len(run.prompt_positions) <= 3
                sequence.prompt_logprobs += [None] * len(run.prompt_positions)
        scheduler.commit(plan, chosen(plan))
    assert seen == [[("a", 0, 3), ("b", 0, 7)], [("a", 3, 7)], []]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (request("new", prompt=0), "empty"),
        (request("new", prompt=64), r"64 tokens, and the model's context of 64"),
        (request("new", max_tokens=-1), "max_tokens is -1"),
        (request("new", prompt=40, max_tokens=20), r"40 tokens.*20.*15 pages of 4 tokens.*has 8"),
        (Request("new", (5, 100), 1, Sampling()), r"outside 0\.\.99"),
        (Request("new", (-1,), 1, Sampling()), r"outside 0\.\.99"),
        (request("old"), "already"),
    ],
)
def test_what_can_never_be_served_is_rejected_with_numbers(bad: Request, text: str) -> None:
    scheduler = make(num_pages=8)
    scheduler.submit(request("old"))
    with pytest.raises(RequestRejected, match=text):
        scheduler.submit(bad)
    assert drain(scheduler) == {"old": "length"}
    assert_all_free(scheduler)


def test_the_largest_request_that_fits_is_served() -> None:
    scheduler = make(num_pages=8, num_slots=2)
    scheduler.submit(request("a", prompt=20, max_tokens=13))
    assert drain(scheduler) == {"a": "length"}
    with pytest.raises(RequestRejected):
        scheduler.submit(request("a", prompt=20, max_tokens=14))


def test_a_step_must_hold_every_decode() -> None:
    with pytest.raises(ValidationError, match=r"max_step_tokens is 3 .* max_seqs = 4"):
        make(max_step_tokens=3)
