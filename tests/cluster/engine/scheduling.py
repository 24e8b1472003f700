"""A small scheduler, and what its plans say."""

from __future__ import annotations

from typing import Any

from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.plan import NEVER, Cuts, Outcome, StepPlan
from divisi.cluster.request import Request, Sampling

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
