"""What must hold of a scheduler at every moment; a `Violation` says of which kind the fault is."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from itertools import chain

from divisi.cluster.engine.memory.pool import Pool
from divisi.cluster.engine.memory.sequence_memory import NOTHING
from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.sequence import Sequence, Status
from divisi.cluster.engine.step.plan import StepPlan


class Fault(Enum):
    """The kinds of faults that a simulation tells apart."""

    LOST_REQUEST = "a request is neither queued, nor running, nor ended"
    GHOST = "a request that has ended is still queued or running"
    SECOND_TERMINAL = "an event after the terminal one"
    MISSING_TERMINAL = "a request ended without a terminal event"
    WRONG_ANSWER = "tokens, finish reason or prompt log-probabilities are not the oracle's"
    CANCEL_IGNORED = "a cancelled request went on"
    WRONG_REFUSAL = "a request was refused or accepted wrongly"
    STARVATION = "the earliest request did not end in time"
    LEAKED_PAGE = "a page is neither free nor held"
    LEAKED_SLOT = "a slot is neither free nor held"
    LEAKED_TABLE = "a page table is neither free nor held"
    SHARED_PAGE = "a page has two holders"
    SHARED_SLOT = "a slot has two holders"
    SHARED_TABLE = "a page table has two holders"
    HELD_BY_WAITING = "a queued request holds memory"
    FREED_TOO_EARLY = "a sequence of the step under way has lost its memory"
    OVER_BUDGET = "a step is larger than it may be"
    CRASH = "an exception in the scheduler"


class Violation(AssertionError):
    """A fault was seen."""

    def __init__(self, fault: Fault, what: str) -> None:
        super().__init__(f"{fault.name}: {what}")
        self.fault = fault


def check_queues(scheduler: Scheduler, unfinished: Collection[Sequence]) -> None:
    """Every request without a terminal event is in exactly one place, and nothing else is."""
    known = set(unfinished)
    served = [*scheduler.running, *scheduler.waiting]
    for sequence in known.difference(served):
        name = sequence.request.request_id
        fault = Fault.MISSING_TERMINAL if sequence.status is Status.FINISHED else Fault.LOST_REQUEST
        raise Violation(fault, f"request {name}, {sequence.status.value}")
    if len(served) != len(known):
        raise Violation(Fault.GHOST, f"{len(served)} are served, {len(known)} are unfinished")


def check_memory(scheduler: Scheduler) -> None:
    """Pages, slots and tables are free, or held by one sequence each; a queued one holds none."""
    running = scheduler.running
    for sequence in scheduler.waiting:
        if sequence.admitted is not None or sequence.length:
            raise Violation(Fault.HELD_BY_WAITING, f"request {sequence.request.request_id}")
    plan = scheduler.outstanding
    for run in () if plan is None else plan.runs:
        if run.sequence.admitted is None:
            raise Violation(Fault.FREED_TOO_EARLY, f"request {run.sequence.request.request_id}")
    holdings = [sequence.holding for sequence in running]
    memory = scheduler.memory
    pages = list(chain.from_iterable(holding.pages for holding in holdings))
    slots = [slot for holding in holdings for slot in (holding.slot, *holding.spares) if slot != NOTHING]
    _check_pool(memory.pages, pages, Fault.SHARED_PAGE, Fault.LEAKED_PAGE)
    _check_pool(memory.slots, slots, Fault.SHARED_SLOT, Fault.LEAKED_SLOT)
    _check_pool(memory.tables, [holding.table for holding in holdings], Fault.SHARED_TABLE, Fault.LEAKED_TABLE)


def _check_pool(pool: Pool, held: list[int], shared: Fault, leaked: Fault) -> None:
    if len(set(held)) != len(held) or pool.num_free + len(held) > pool.size:
        raise Violation(shared, f"held: {held}, free: {pool.num_free} of {pool.size}")
    if pool.num_free + len(held) < pool.size:
        raise Violation(leaked, f"held: {held}, free: {pool.num_free} of {pool.size}")
    if pool.num_used != len(held):
        raise Violation(leaked, f"{pool.num_used} are marked as used, {len(held)} are held")


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    """The limits of a step, and that it counts itself rightly."""
    config = scheduler.config
    rows = sum(run.num_rows for run in plan.runs)
    prompt_rows = sum(len(run.prompt_positions) for run in plan.scans)
    limits = (
        ("rows", rows, config.max_step_tokens),
        ("prompt logit rows", prompt_rows, config.max_prompt_logit_rows),
        ("sequences", len(scheduler.running), config.max_seqs),
        ("rows told", plan.num_rows, rows),
        ("rows that are not told", rows, plan.num_rows),
    )
    for what, found, limit in limits:
        if found > limit:
            raise Violation(Fault.OVER_BUDGET, f"{found} {what}, at most {limit}")
