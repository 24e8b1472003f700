"""Plans that are given up before they run, and steps that are cut in two."""

from __future__ import annotations

import pytest

from divisi.cluster.engine.step.plan import ALWAYS, Cuts
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
