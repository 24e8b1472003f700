"""Schedulers, and one loop, with one bug each, and the fault that a simulation has to report for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from divisi.cluster.engine.memory.sequence_memory import SLOTS_TO_PREFILL
from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.sequence import Sequence, Status
from divisi.cluster.engine.step.plan import Leave, Outcome, PlanLayout, Run, StepPlan
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import EndReason, Request
from tests.sim.invariants import Fault
from tests.sim.ledger import Record
from tests.sim.simulation import Simulation


class LosesThePreempted(Scheduler):
    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        self.waiting.popleft()


class ForgetsToDequeueTheCancelled(Scheduler):
    def cancel(self, request_id: str) -> Outcome | None:
        sequence = self._sequences.get(request_id)
        waits = sequence is not None and sequence.status is Status.WAITING
        outcome = super().cancel(request_id)
        if waits and outcome is not None:
            self.waiting.append(outcome.sequence)
        return outcome


class EndsTwice(Scheduler):
    def commit(
        self, plan: StepPlan, tokens: Seq[Seq[int]], ends: Mapping[Sequence, EndReason] | None = None
    ) -> list[Outcome]:
        outcomes = super().commit(plan, tokens, ends)
        return [*outcomes, *(outcome for outcome in outcomes if outcome.finish_reason)]


class EndsTheCancelledBeforeTheStepDoes(Scheduler):
    """A cancelled request ends at once, and once more with the step that includes it."""

    def cancel(self, request_id: str) -> Outcome | None:
        sequence = self._sequences.get(request_id)
        ended = super().cancel(request_id)
        if ended is None and sequence is not None:
            return Outcome(sequence, (), "cancelled")
        return ended


class EndsWithoutAWord(Scheduler):
    def commit(
        self, plan: StepPlan, tokens: Seq[Seq[int]], ends: Mapping[Sequence, EndReason] | None = None
    ) -> list[Outcome]:
        return [outcome for outcome in super().commit(plan, tokens, ends) if outcome.finish_reason != "stop"]


class CancelsTheQueuedWithoutAWord(Scheduler):
    def cancel(self, request_id: str) -> Outcome | None:
        outcome = super().cancel(request_id)
        return None if outcome is not None and outcome.sequence.num_generated == 0 else outcome


class AdmitsTheLatestFirst(Scheduler):
    def submit(self, request: Request) -> Sequence:
        sequence = super().submit(request)
        self.waiting.rotate(1)
        return sequence


class AdmitsTheShortestFirst(Scheduler):
    """Good for the mean, and the end of who has a long prompt."""

    def _prefilling(self) -> Iterator[Sequence]:
        queue = sorted(self.waiting, key=lambda sequence: len(sequence.tokens))
        self.waiting.clear()
        self.waiting.extend(queue)
        yield from super()._prefilling()


class PutsThePreemptedLast(Scheduler):
    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        self.waiting.rotate(-1)


class PrefersTheLatestDecodes(Scheduler):
    """The earliest waits while anybody else has something to do."""

    def plan(self) -> StepPlan | None:
        plan = super().plan()
        if plan is not None and len(plan.rings) > 1:
            num_rows = plan.num_rows - plan.rings[0].num_rows
            self.outstanding = plan = replace(plan, rings=plan.rings[1:], num_rows=num_rows)
        return plan


class PausesTheRunningForTheQueue(Scheduler):
    """Prefill comes first, and decodes only where there is none."""

    def plan(self) -> StepPlan | None:
        plan = super().plan()
        if plan is None or not plan.rings or not plan.scans:
            return plan
        self.outstanding = replace(plan, rings=(), num_rows=sum(run.num_rows for run in plan.scans))
        return self.outstanding


class ForgetsTheAge(Scheduler):
    """An answer that was begun elsewhere comes after all that wait here."""

    def submit(self, request: Request) -> Sequence:
        return super().submit(replace(request, arrived=0.0))


class MergesTheAnswerIntoThePrompt(Scheduler):
    def submit(self, request: Request) -> Sequence:
        done = len(request.answered)
        prompt, left = request.prompt + request.answered, request.max_tokens - done
        if done and request.prompt:
            request = replace(request, prompt=prompt, answered=(), max_tokens=left)
        return super().submit(request)


class AnswersFromTheStart(Scheduler):
    def submit(self, request: Request) -> Sequence:
        return super().submit(replace(request, answered=()))


class LeaksAPage(Scheduler):
    def _release(self, sequence: Sequence) -> None:
        sequence.holding.pages = sequence.holding.pages[1:]
        super()._release(sequence)


class LeaksThePagesOfTheCancelled(Scheduler):
    def _finish(
        self, sequence: Sequence, reason: EndReason, token_ids: Seq[int] = (), stop_id: int | None = None
    ) -> Outcome:
        if reason == "cancelled" and sequence.admitted is not None:
            sequence.admitted.pages = []
        return super()._finish(sequence, reason, token_ids, stop_id)


class FreesThePlannedAtOnce(Scheduler):
    """A cancelled request's memory goes to others while a step still writes to it."""

    def _is_planned(self, sequence: Sequence) -> bool:
        return False


class LeaksTheSpare(Scheduler):
    """Only where a prefill is cancelled or preempted half way."""

    def _release(self, sequence: Sequence) -> None:
        sequence.holding.spares = []
        super()._release(sequence)


class LeaksATable(Scheduler):
    def _release(self, sequence: Sequence) -> None:
        super()._release(sequence)
        if sequence.cancelled:
            self.memory.tables.take(1)


class SharesAPage(Scheduler):
    def _admit(self) -> Sequence:
        sequence = super()._admit()
        if len(self.running) > 1:
            sequence.holding.pages[0] = self.running[0].holding.pages[0]
        return sequence


class SharesASlot(Scheduler):
    def _admit(self) -> Sequence:
        sequence = super()._admit()
        if len(self.running) > 1:
            sequence.holding.spares[0] = max(self.running[0].holding.slot, *self.running[0].holding.spares, -1)
        return sequence


class SharesATable(Scheduler):
    def _admit(self) -> Sequence:
        sequence = super()._admit()
        if len(self.running) > 1:
            sequence.holding.table = self.running[0].holding.table
        return sequence


class KeepsPagesWhileQueued(Scheduler):
    def _preempt(self, sequence: Sequence) -> None:
        holding = sequence.holding
        super()._preempt(sequence)
        sequence.admitted = holding


class SettlesOnAnotherSlot(Scheduler):
    def _commit_scan(self, run: Run) -> None:
        super()._commit_scan(run._replace(leaves=(Leave(run.end, run.sequence.holding.spares[-1]),)))


class SendsAgainAfterPreemption(Scheduler):
    """The recomputed answer starts anew, and the client reads its first tokens twice."""

    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        del sequence.tokens[len(sequence.request.prompt) :]


class IgnoresStopIds(Scheduler):
    def _advance(self, sequence: Sequence, tokens: Seq[int], end: EndReason | None, chooses: bool) -> Outcome:
        outcome = super()._advance(sequence, tokens, end, chooses)
        return outcome if outcome.stop_id is None else outcome._replace(token_ids=(outcome.stop_id,))


class GoesOnAfterTheGrammarsEnd(Scheduler):
    def commit(
        self, plan: StepPlan, tokens: Seq[Seq[int]], ends: Mapping[Sequence, EndReason] | None = None
    ) -> list[Outcome]:
        goes_on = [chosen or [0] * run.chooses for run, chosen in zip(plan.runs, tokens, strict=True)]
        return super().commit(plan, goes_on)


class AnswersOneTokenTooMany(Scheduler):
    def submit(self, request: Request) -> Sequence:
        sequence = super().submit(request)
        sequence.max_length += request.max_tokens > 0
        return sequence


class SwapsTheTokensOfTwo(Scheduler):
    def commit(
        self, plan: StepPlan, tokens: Seq[Seq[int]], ends: Mapping[Sequence, EndReason] | None = None
    ) -> list[Outcome]:
        chosen = [each for each in tokens if each]
        return super().commit(plan, [chosen.pop() if each else each for each in tokens], ends)


class AsksForPromptLogprobsAnew(Scheduler):
    """The preempted recomputes its prompt and appends log-probabilities that it has."""

    def _preempt(self, sequence: Sequence) -> None:
        super()._preempt(sequence)
        if sequence.prompt_logprobs is not None:
            del sequence.prompt_logprobs[1:2]


class IgnoresCancelsDuringAStep(Scheduler):
    def cancel(self, request_id: str) -> Outcome | None:
        return None if self.outstanding is not None else super().cancel(request_id)


class IgnoresCancelsInTheQueue(Scheduler):
    def cancel(self, request_id: str) -> Outcome | None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.status is Status.WAITING:
            return None
        return super().cancel(request_id)


class ForgetsTheCancelWhenTheStepEndsThePrefill(Scheduler):
    def _commit_scan(self, run: Run) -> None:
        super()._commit_scan(run)
        if run.completes:
            run.sequence.cancelled = False


class AcceptsWhatNeverFits(Scheduler):
    def check(self, request: Request) -> int:
        try:
            return super().check(request)
        except RequestRejected as error:
            if "pages" not in str(error):
                raise
            return min(len(request.prompt) + request.max_tokens, self.config.max_model_len)


class RefusesAFullCache(Scheduler):
    def check(self, request: Request) -> int:
        total = super().check(request)
        if total - 1 == self.config.num_pages * self.config.page_size:
            raise RequestRejected("too long")
        return total


class ExceedsTheTokenBudget(Scheduler):
    def _plan_prefills(self, layout: PlanLayout) -> None:
        layout.rows_left = self.config.max_step_tokens
        super()._plan_prefills(layout)


class ExceedsTheLogitRows(Scheduler):
    def _prefill_end(self, sequence: Sequence, layout: PlanLayout) -> int:
        layout.prompt_logits_left = self.config.max_prompt_logit_rows
        return super()._prefill_end(sequence, layout)


class TakesPagesThatAreNotThere(Scheduler):
    def _prefilling(self) -> Iterator[Sequence]:
        yield from [sequence for sequence in self.running if sequence.status is Status.PREFILL]
        while self.waiting and self.memory.tables.num_free and self.memory.slots.num_free >= SLOTS_TO_PREFILL:
            yield self._admit()


class CommitsAbortedSteps(Simulation):
    """The loop takes the tokens of an attempt that did not get through for those of the step."""

    def _step(self, plan: StepPlan, charged: Record | None) -> None:
        if self._random.random() < self._workload.abort_rate:
            self._commit(plan, [[0] * run.chooses for run in plan.runs], charged)
        else:
            super()._step(plan, charged)


MUTANTS: tuple[tuple[type[Scheduler] | type[Simulation], Fault], ...] = (
    (CommitsAbortedSteps, Fault.WRONG_ANSWER),
    (LosesThePreempted, Fault.LOST_REQUEST),
    (ForgetsToDequeueTheCancelled, Fault.GHOST),
    (EndsTwice, Fault.SECOND_TERMINAL),
    (EndsTheCancelledBeforeTheStepDoes, Fault.GHOST),
    (EndsWithoutAWord, Fault.MISSING_TERMINAL),
    (CancelsTheQueuedWithoutAWord, Fault.MISSING_TERMINAL),
    (AdmitsTheLatestFirst, Fault.STARVATION),
    (AdmitsTheShortestFirst, Fault.STARVATION),
    (PutsThePreemptedLast, Fault.STARVATION),
    (PrefersTheLatestDecodes, Fault.STARVATION),
    (PausesTheRunningForTheQueue, Fault.STARVATION),
    (ForgetsTheAge, Fault.STARVATION),
    (MergesTheAnswerIntoThePrompt, Fault.WRONG_ANSWER),
    (AnswersFromTheStart, Fault.WRONG_ANSWER),
    (LeaksAPage, Fault.LEAKED_PAGE),
    (LeaksThePagesOfTheCancelled, Fault.LEAKED_PAGE),
    (FreesThePlannedAtOnce, Fault.FREED_TOO_EARLY),
    (LeaksTheSpare, Fault.LEAKED_SLOT),
    (LeaksATable, Fault.LEAKED_TABLE),
    (SharesAPage, Fault.SHARED_PAGE),
    (SharesASlot, Fault.SHARED_SLOT),
    (SharesATable, Fault.SHARED_TABLE),
    (KeepsPagesWhileQueued, Fault.HELD_BY_WAITING),
    (SettlesOnAnotherSlot, Fault.WRONG_ANSWER),
    (SendsAgainAfterPreemption, Fault.WRONG_ANSWER),
    (IgnoresStopIds, Fault.WRONG_ANSWER),
    (GoesOnAfterTheGrammarsEnd, Fault.WRONG_ANSWER),
    (AnswersOneTokenTooMany, Fault.WRONG_ANSWER),
    (SwapsTheTokensOfTwo, Fault.WRONG_ANSWER),
    (AsksForPromptLogprobsAnew, Fault.WRONG_ANSWER),
    (IgnoresCancelsDuringAStep, Fault.CANCEL_IGNORED),
    (IgnoresCancelsInTheQueue, Fault.CANCEL_IGNORED),
    (ForgetsTheCancelWhenTheStepEndsThePrefill, Fault.CANCEL_IGNORED),
    (AcceptsWhatNeverFits, Fault.WRONG_REFUSAL),
    (RefusesAFullCache, Fault.WRONG_REFUSAL),
    (ExceedsTheTokenBudget, Fault.OVER_BUDGET),
    (ExceedsTheLogitRows, Fault.OVER_BUDGET),
    (TakesPagesThatAreNotThere, Fault.CRASH),
)
