"""Plans that abort again and again are taken apart until who is to blame is alone."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest

from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.request import Request, Sampling
from tests.sim.invariants import check_memory, check_plan

CONFIG = SchedulerConfig(
    vocab_size=100, max_model_len=64, num_pages=64, page_size=4, num_slots=20, max_seqs=16, max_step_tokens=40
)


def request(name: str) -> Request:
    return Request(name, (1, 2, 3), 30, Sampling())


def scheduler_of(old: Seq[str], new: Seq[str] = ()) -> Scheduler:
    """With sequences that decode, and some that have not taken part in a step yet."""
    scheduler = Scheduler(CONFIG)
    for name in old:
        scheduler.submit(request(name))
    if old:
        commit(scheduler, planned(scheduler))
    for name in new:
        scheduler.submit(request(name))
    return scheduler


def planned(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.outstanding or scheduler.plan()
    assert plan is not None
    check_plan(scheduler, plan)
    return plan


def names(plan: StepPlan) -> list[str]:
    return [run.sequence.request.request_id for run in plan.runs]


def commit(scheduler: Scheduler, plan: StepPlan) -> None:
    scheduler.commit(plan, [[7] if run.chooses else [] for run in plan.runs])
    check_memory(scheduler)


def deaths_of(scheduler: Scheduler, deadly: str, most: int = 50) -> tuple[int, list[str], list[list[str]]]:
    """Runs steps, of which those with `deadly` abort, until somebody ends; deaths, who ended, and the plans."""
    deaths, plans = 0, []
    for _ in range(most):
        plan = planned(scheduler)
        plans.append(names(plan))
        if deadly not in plans[-1]:
            commit(scheduler, plan)
            continue
        deaths += 1
        ended = scheduler.strike() or []
        check_memory(scheduler)
        if ended:
            assert {outcome.finish_reason for outcome in ended} == {"lost"}
            return deaths, [outcome.sequence.request.request_id for outcome in ended], plans
    raise AssertionError(f"nobody ended: {plans}")


def test_a_plan_is_run_again_once_as_it_is() -> None:
    scheduler = scheduler_of("ab", "c")
    plan = planned(scheduler)
    assert names(plan) == ["a", "b", "c"]
    assert not plan.alone
    assert scheduler.strike() is None
    assert scheduler.outstanding is plan
    commit(scheduler, plan)


def test_newcomers_are_left_out_first_and_then_each_is_tried_alone() -> None:
    scheduler = scheduler_of("ab", "cd")
    planned(scheduler)
    scheduler.strike()
    assert scheduler.strike() == []
    tried = []
    for _ in range(4):
        plan = planned(scheduler)
        tried.append((names(plan), plan.alone))
        commit(scheduler, plan)
    assert tried == [(["a", "b"], True), (["c"], True), (["d"], True), (["a", "b", "c", "d"], False)]


def test_a_deadly_newcomer_ends_after_four_deaths() -> None:
    scheduler = scheduler_of("abcdefgh", "x")
    deaths, ended, plans = deaths_of(scheduler, "x")
    assert (deaths, ended) == (4, ["x"])
    assert plans[2:] == [list("abcdefgh"), ["x"], ["x"]]
    assert names(planned(scheduler)) == list("abcdefgh")


@pytest.mark.parametrize("deadly", list("abcdefgh"))
def test_one_that_has_run_for_long_is_found_by_halves(deadly: str) -> None:
    deaths, ended, _ = deaths_of(scheduler_of("abcdefgh"), deadly)
    assert ended == [deadly]
    assert deaths == 2 + 1 + 2 + 2, "twice together, once without others, two halves, twice alone"


def test_two_aborts_of_different_plans_accuse_nobody() -> None:
    scheduler = scheduler_of("ab")
    for _ in range(5):
        plan = planned(scheduler)
        assert scheduler.strike() is None
        assert not plan.alone
        commit(scheduler, plan)


def test_what_commits_alone_is_cleared() -> None:
    """Failing alone once, and a commit between, is no proof."""
    scheduler = scheduler_of("a")
    for _ in range(3):
        plan = planned(scheduler)
        scheduler.strike()
        scheduler.strike()
        plan = planned(scheduler)
        assert plan.alone
        assert scheduler.strike() is None, "once alone"
        commit(scheduler, plan)
        assert not planned(scheduler).alone


def test_a_suspect_that_is_cancelled_is_none() -> None:
    scheduler = scheduler_of("ab", "c")
    planned(scheduler)
    scheduler.strike()
    scheduler.cancel("c")
    ended = scheduler.strike()
    assert ended is not None
    assert [outcome.finish_reason for outcome in ended] == ["cancelled"]
    commit(scheduler, planned(scheduler))
    assert names(planned(scheduler)) == ["a", "b"]


@pytest.mark.parametrize("seed", range(40))
def test_random_deaths_with_tight_memory_end_the_deadly_only(seed: int) -> None:
    """Preemption among suspects, arrivals and cancels beside them."""
    rng = random.Random(seed)
    config = CONFIG.model_copy(update={"num_pages": 20, "max_seqs": 8, "num_slots": 10})
    scheduler, left, ended = Scheduler(config), [f"r{number}" for number in range(14)], {}
    deadly = {name for name in left if rng.random() < 0.15}
    expected = set(left)
    for _ in range(3_000):
        if left and rng.random() < 0.2:
            scheduler.submit(request(left.pop()))
        plan = scheduler.outstanding or scheduler.plan()
        if plan is None:
            if not left:
                break
            continue
        check_plan(scheduler, plan)
        check_memory(scheduler)
        if deadly & set(names(plan)) or rng.random() < 0.05:
            outcomes = scheduler.strike() or []
        else:
            outcomes = scheduler.commit(plan, [[7] if run.chooses else [] for run in plan.runs])
        ended |= {out.sequence.request.request_id: out.finish_reason for out in outcomes if out.finish_reason}
    assert set(ended) == expected, f"seed {seed}"
    lost = {name for name, reason in ended.items() if reason == "lost"}
    assert deadly <= lost, f"seed {seed}"
    assert len(lost - deadly) <= 1, f"seed {seed}: a step alone may be unlucky twice"
