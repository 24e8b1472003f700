"""What must hold of a scheduler at every moment; a `Violation` says of which kind the fault is."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from itertools import chain

from divisi.cluster.plan import StepPlan
from divisi.cluster.scheduler import Scheduler
from divisi.cluster.sequence import NOTHING, Sequence, Status


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
    LEAKED_ROW = "a row is neither free nor held"
    SHARED_PAGE = "a page has two holders"
    SHARED_SLOT = "a slot has two holders"
    SHARED_ROW = "a row has two holders"
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
    """Pages, slots and rows are free, or held by one sequence each; a queued one holds none, a planned one its own."""
    running = scheduler.running
    for sequence in scheduler.waiting:
        if sequence.pages or sequence.length or max(sequence.slot, sequence.spare, sequence.row) != NOTHING:
            raise Violation(Fault.HELD_BY_WAITING, f"request {sequence.request.request_id}")
    plan = scheduler.outstanding
    planned = () if plan is None else (*plan.decodes, *(chunk.sequence for chunk in plan.chunks))
    for sequence in planned:
        if sequence.row == NOTHING:
            raise Violation(Fault.FREED_TOO_EARLY, f"request {sequence.request.request_id}")
    pages = list(chain.from_iterable(sequence.pages for sequence in running))
    slots = [slot for sequence in running for slot in (sequence.slot, sequence.spare) if slot != NOTHING]
    rows = [sequence.row for sequence in running]
    pool, config = scheduler.pages, scheduler.config
    _check_pool("page", pages, pool.num_free, config.num_pages, Fault.SHARED_PAGE, Fault.LEAKED_PAGE)
    _check_pool("slot", slots, scheduler.slots.num_free, config.num_slots, Fault.SHARED_SLOT, Fault.LEAKED_SLOT)
    _check_pool("row", rows, len(scheduler._rows), config.max_seqs, Fault.SHARED_ROW, Fault.LEAKED_ROW)
    if pool.num_used != len(pages):
        raise Violation(Fault.LEAKED_PAGE, f"{pool.num_used} pages are marked as used, {len(pages)} are held")


def _check_pool(what: str, held: list[int], free: int, total: int, shared: Fault, leaked: Fault) -> None:
    if len(set(held)) != len(held) or free + len(held) > total:
        raise Violation(shared, f"{what}s held: {held}, free: {free} of {total}")
    if free + len(held) < total:
        raise Violation(leaked, f"{what}s held: {held}, free: {free} of {total}")


def check_plan(scheduler: Scheduler, plan: StepPlan) -> None:
    """The limits of a step, and that it counts itself rightly."""
    config = scheduler.config
    sizes = [chunk.end - chunk.start for chunk in plan.chunks]
    tokens = len(plan.decodes) + sum(sizes)
    rows = sum(len(chunk.sequence.prompt_positions(chunk.start, chunk.end)) for chunk in plan.chunks)
    limits = (
        ("tokens", tokens, config.max_step_tokens),
        ("prompt logit rows", rows, config.max_prompt_logit_rows),
        ("sequences", len(scheduler.running), config.max_seqs),
        ("tokens told", plan.num_tokens, tokens),
        ("tokens that are not told", tokens, plan.num_tokens),
    )
    for what, found, limit in limits:
        if found > limit:
            raise Violation(Fault.OVER_BUDGET, f"{found} {what}, at most {limit}")
