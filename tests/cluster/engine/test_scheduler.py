from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from divisi.cluster.engine.memory.sequence_memory import NOTHING
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.sequence import Status
from divisi.cluster.engine.step.plan import ALWAYS, NEVER, Cuts, Outcome, StepPlan
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, Sampling
from divisi.cluster.triggers import Span

STOP, EOS = 9, 8
THINK, THOUGHT, CALL, CALLED = 2, 3, 4, 5


def make(cuts: Cuts = NEVER, **changes: Any) -> Scheduler:
    sizes = {"vocab_size": 100, "max_model_len": 64, "num_pages": 32, "page_size": 4, "num_slots": 8, "max_seqs": 4}
    limits = {"max_step_tokens": 16}
    return Scheduler(SchedulerConfig(**{**sizes, **limits, **changes}), cuts=cuts)


def request(name: str, prompt: int = 5, max_tokens: int = 4, **changes: Any) -> Request:
    return Request(name, tuple(range(10, 10 + prompt)), max_tokens, Sampling(), **changes)


def step(scheduler: Scheduler, token: int = 1) -> tuple[StepPlan, list[Outcome]]:
    plan = scheduler.plan()
    assert plan is not None
    return plan, scheduler.commit(plan, chosen(plan, token))


def chosen(plan: StepPlan, token: int = 1) -> list[list[int]]:
    return [[token] * run.chooses for run in plan.runs]


def chunks(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(run.sequence.request.request_id, run.start, run.end) for run in plan.scans]


def decodes(plan: StepPlan) -> list[str]:
    return [run.sequence.request.request_id for run in plan.rings]


def drain(scheduler: Scheduler) -> dict[str, str]:
    ends: dict[str, str] = {}
    for _ in range(1000):
        if not (scheduler.running or scheduler.waiting):
            return ends
        for outcome in step(scheduler)[1]:
            if outcome.finish_reason:
                assert outcome.sequence.request.request_id not in ends
                ends[outcome.sequence.request.request_id] = outcome.finish_reason
    raise AssertionError("requests do not end")


def assert_all_free(scheduler: Scheduler) -> None:
    assert not scheduler.running
    assert not scheduler.waiting
    memory = scheduler.memory
    for pool in (memory.pages, memory.slots, memory.tables):
        assert (pool.num_free, pool.num_used) == (pool.size, 0)


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


def test_a_plan_larger_than_the_new_share_is_given_up_and_nothing_of_it_counts() -> None:
    scheduler = make(max_seqs=2)
    scheduler.submit(request("a", prompt=30, max_tokens=2))
    plan = scheduler.plan()
    assert plan is not None
    assert chunks(plan) == [("a", 0, 16)]
    assert scheduler.resize(6) == [], "given up, and nobody ends with it"
    with pytest.raises(AssertionError):
        scheduler.commit(plan, chosen(plan))
    assert [chunks(step(scheduler)[0]) for _ in range(2)] == [[("a", 0, 6)], [("a", 6, 12)]]
    assert scheduler.resize(16) is None, "nothing is under way"
    assert chunks(step(scheduler)[0]) == [("a", 12, 28)]
    plan = scheduler.plan()
    assert plan is not None
    assert scheduler.resize(2) is None, "it has two rows"
    scheduler.commit(plan, chosen(plan))
    assert drain(scheduler) == {"a": "length"}
    assert_all_free(scheduler)


def test_a_plan_that_is_given_up_returns_the_pages_of_its_drafts_and_ends_what_was_cancelled() -> None:
    scheduler = make(max_draft_tokens=7, page_size=2)
    for name in ("a", "b"):
        scheduler.submit(request(name, prompt=4, max_tokens=20))
    step(scheduler)
    free = scheduler.memory.pages.num_free
    plan = scheduler.plan()
    assert plan is not None
    assert plan.num_rows == 16
    assert scheduler.memory.pages.num_free < free - 2
    assert scheduler.cancel("b") is None
    (outcome,) = scheduler.resize(4) or ()
    assert (outcome.sequence.request.request_id, outcome.finish_reason) == ("b", "cancelled")
    assert scheduler.memory.pages.num_free == free - 1 + 2, "the next token's page of a; b has given its two back"
    plan = scheduler.plan()
    assert plan is not None
    assert (decodes(plan), plan.num_rows) == (["a"], 4)
    scheduler.commit(plan, chosen(plan))
    assert drain(scheduler) == {"a": "length"}
    assert_all_free(scheduler)


def test_what_memory_was_to_do_before_a_plan_that_is_given_up_is_done_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = make()
    scheduler.submit(request("a", prompt=30))
    copies = iter([((1, 2),), ((3, 4),)])
    monkeypatch.setattr(scheduler.memory, "take_copies", lambda: next(copies, ()))
    first = scheduler.plan()
    assert first is not None
    scheduler.resize(4)
    second = scheduler.plan()
    assert second is not None
    assert second.ops.page_copies == ((1, 2), (3, 4))
    scheduler.commit(second, chosen(second))
    third = scheduler.plan()
    assert third is not None
    assert third.ops.page_copies == ()


def test_a_step_is_cut_between_two_sequences_if_it_only_decodes() -> None:
    scheduler = make(ALWAYS, max_draft_tokens=2, max_step_tokens=9)
    for name, drafts in (("a", 2), ("b", 0), ("c", 2)):
        scheduler.submit(request(name, prompt=2, max_tokens=3, max_draft_tokens=drafts))
    prefill, _ = step(scheduler)
    assert (prefill.num_rows, prefill.second) == (6, 0)
    plan, _ = step(scheduler)
    assert [run.row for run in plan.rings] == [0, 2, 3], "the answer has three tokens, and one more row is no draft"
    assert (plan.num_rows, plan.second, plan.cut) == (5, 2, (2, 3))
    scheduler.submit(request("late", prompt=3))
    assert step(scheduler)[0].second == 0


@pytest.mark.parametrize(
    ("cuts", "crowded", "second"),
    [(Cuts(range(3, 5)), False, 2), (Cuts(range(3, 5)), True, 0), (Cuts(range(5, 9)), False, 0), (ALWAYS, True, 2)],
)
def test_steps_are_cut_where_it_pays_and_cores_are_free(cuts: Cuts, crowded: bool, second: int) -> None:
    scheduler = make(cuts)
    scheduler.resize(16, crowded=crowded)
    for name in "abcd":
        scheduler.submit(request(name, prompt=2))
    step(scheduler)
    assert step(scheduler)[0].second == second


def test_a_single_sequence_is_never_cut() -> None:
    scheduler = make(ALWAYS, max_draft_tokens=3)
    scheduler.submit(request("a"))
    step(scheduler)
    plan, _ = step(scheduler)
    assert (plan.num_rows, plan.second) == (3, 0)
