"""One attention worker's engine: requests in, token events out, one step at a time.

Plain Python and tensors; no Ray, and no threads but those that work on grammars. The loop around it agrees
on each step with the gang:

    plan = engine.plan()
    for index in range(len(plan.counts)):
        engine.run_pass(plan, index, dispatcher)    # on StepAborted: all passes again, in the next epoch
    events = engine.commit(plan)

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from time import perf_counter

import torch
from torch import Tensor

from divisi.cluster.engine.grammar import Grammars, Guide
from divisi.cluster.engine.runner import Rehearsal, Runner
from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.engine.step.batch import BatchBuilder
from divisi.cluster.engine.step.clock import PassClock
from divisi.cluster.engine.step.drafts import Drafts, Row
from divisi.cluster.engine.step.plan import NO_OPS, Outcome, Run, StepPlan
from divisi.cluster.engine.step.sampling import Choice, StepSampler, tell_prompt
from divisi.cluster.errors import RequestRejected, StepAborted
from divisi.cluster.request import Request, TokenEvent, TokenLogprob
from divisi.cluster.step_times.times import StepTimes
from divisi.model.batch import StepBatch
from divisi.model.dispatcher import Dispatcher
from divisi.model.inference import in_inference_mode
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch

_POISON = (
    "ranks of the gang were lost in every step that computed this request, alone at last; they may have died of it"
)


class Engine:
    """Schedules, runs and commits the steps of one attention worker."""

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        *,
        device: torch.device,
        stopwatch: Stopwatch,
        grammars: Grammars | None = None,
        times: StepTimes | None = None,
        rehearsal: Rehearsal | None = None,
        wake: Callable[[], None] = lambda: None,
        padded: bool = False,
    ) -> None:
        """Without `grammars`, requests that have one are rejected. `times` is told how long steps take; the
        `rehearsal`'s come first. `padded`: decode steps are filled up to a bucket; the runner must take that.

        `wake` is called, in any thread, when a request that waited for its grammar waits no more: plan again.
        """
        self._runner = runner
        self._scheduler = scheduler
        self._grammars = grammars
        self._wake = wake
        self._sampler = StepSampler(sampler, grammars, device)
        self._stopwatch = stopwatch
        self._times = times
        self._rehearsal = rehearsal
        self._begun = 0.0
        """When the step under way was planned."""
        self._clock = PassClock(device)
        """Of its draft passes."""
        self.draft_seconds: list[float] = []
        """What those of the last committed step took, one by one; the first with all that precedes it."""
        self._builder = BatchBuilder(scheduler.config, device, padded=padded)
        self._events: list[TokenEvent] = []
        self._drafts = Drafts()
        """Of the step under way."""
        self._found: Tensor | list[int] | None = None
        """What all passes of the step under way have found: logits [R, V], or the tokens of its rows."""
        self._compiling: dict[str, tuple[Request, Future[Guide]]] = {}
        """Requests whose grammar is being compiled; not in the queue yet, so that they hold up nobody."""
        self._steps = self._aborted_steps = self._aborted_drafting = self._prefill_tokens = self._generated_tokens = 0

    def submit(self, request: Request) -> None:
        """Queue a request, once its grammar is compiled. Raises RequestRejected if it can never be served."""
        if request.request_id in self._compiling:
            raise RequestRejected(f"request id {request.request_id!r} is already being served")
        if request.grammar is None:
            self._queue(request)
            return
        if self._grammars is None:
            raise RequestRejected("this worker cannot follow a grammar: send the request without one")
        self._scheduler.check(request)
        compiled = self._grammars.compile(request.grammar)
        self._compiling[request.request_id] = (request, compiled)
        compiled.add_done_callback(lambda _: self._wake())

    def cancel(self, request_id: str) -> None:
        """End a request now or, if the step under way includes it, with that step. Unknown ids are ignored."""
        if (compiling := self._compiling.pop(request_id, None)) is not None:
            compiling[1].cancel()
            self._events.append(TokenEvent(request_id, (), None, finish_reason="cancelled"))
        outcome = self._scheduler.cancel(request_id)
        if outcome is not None:
            self._events.append(self._event(outcome))

    def plan(self) -> StepPlan | None:
        """Plan the next step, to be run, again if it aborts; None when there is nothing to do.

        Returns at once: requests whose grammar is still being compiled have no part in it.
        """
        if self._rehearsal is not None:
            if (plan := self._rehearsal.plan()) is not None:
                return plan
            self._rehearsal = None
        self._queue_compiled()
        self._stopwatch.start()
        self._begun = perf_counter()
        plan = self._scheduler.plan()
        if plan is not None:
            self._builder.grow(plan.growths)
        self._stopwatch.lap("scheduler")
        return plan

    def resize(self, max_rows: int, *, crowded: bool) -> bool:
        """Plan with so many rows a step from now on; whether the plan under way was larger, and is no more.

        `crowded`: ranks share cores.
        """
        given_up = self._scheduler.resize(max_rows, crowded=crowded)
        self._events += [self._event(outcome) for outcome in given_up or ()]
        return given_up is not None

    def strike(self) -> bool:
        """The step under way has lost a rank inside a layer; whether its plan is no more, and another comes next."""
        if self._rehearsal is not None:
            return False
        given_up = self._scheduler.strike()
        self._events += [self._event(outcome, error=_POISON) for outcome in given_up or ()]
        return given_up is not None

    def run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        """Run pass `index` of `plan.counts`. When this raises (StepAborted), run all passes of the plan again."""
        if self._rehearsal is not None:
            self._rehearsal.run_pass(plan, index, dispatcher)
            return
        if 0 < index < len(plan.counts) - 1 and self._drafts.told is not None:
            return  # the first pass has drawn its drafts, too
        self._run_pass(plan, index, dispatcher)

    @in_inference_mode
    def _run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        self._stopwatch.start()
        if index == 0:
            self._drafts, self._found = Drafts(), None
            self._clock.start()
            self._sampler.start(plan)
            if plan.ops != NO_OPS:
                self._runner.prepare(*plan.ops)
        try:
            if index < len(plan.counts) - 1:
                self._draft(plan, index, dispatcher)
            else:
                self._run_full(plan, dispatcher)
        except StepAborted:
            self._aborted_steps += 1
            self._aborted_drafting += index < len(plan.counts) - 1
            raise

    def _draft(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        """One more draft of each sequence that drafts so far; or all that the step is to have, with the first."""
        if index == 0 and self._draft_at_once(plan, dispatcher):
            return
        batch = self._builder.build_draft(plan, index, self._drafts)
        self._draft_one(plan.drafting[: plan.counts[index]], index, batch, dispatcher)
        self._clock.mark()

    def _draft_at_once(self, plan: StepPlan, dispatcher: Dispatcher) -> bool:
        """Where nothing but the drafts before it decides about a draft, and the model is in this process."""
        counts, draws = plan.counts[:-1], self._sampler.draws(plan.drafting)
        if draws is None or not self._runner.drafts_at_once(counts[0], dispatcher):
            return False
        batch = self._builder.build_first_draft(plan)
        self._stopwatch.lap("scheduler")
        passes = self._runner.draft_all(batch, counts, dispatcher, draws)
        self._clock.mark_all(passes.seconds)
        self._drafts.tell(plan.drafting, self._sampler.drafted(plan.drafting, passes.tokens))
        return True

    def _draft_one(self, runs: Iterable[Run], index: int, batch: StepBatch, dispatcher: Dispatcher) -> None:
        drafts, rows = self._drafts, [Row(run, index) for run in runs]
        self._sampler.ask(rows, drafts)
        self._stopwatch.lap("scheduler")
        hidden_SD = None if drafts.hidden_SD is None else drafts.hidden_SD[: batch.num_tokens]
        logits_SV, drafts.hidden_SD = self._runner.draft(batch, dispatcher, hidden_SD)
        drafts.add([row.run for row in rows], self._sampler.draft(rows, logits_SV[: len(rows)], drafts))
        self._stopwatch.lap("sampling")

    def _run_full(self, plan: StepPlan, dispatcher: Dispatcher) -> None:
        batch = self._builder.build(plan, self._drafts)
        self._sampler.ask_all(plan.choosing, self._drafts)
        self._stopwatch.lap("scheduler")
        if plan.second:
            self._found = self._runner.forward_in_turns(batch.cut(*plan.cut), dispatcher)
            return
        if not plan.scans and (draws := self._sampler.draws_of_all()) is not None:
            self._found = self._runner.draw(batch, dispatcher, draws)
        if self._found is None:
            self._found = self._runner.forward(batch, dispatcher)[: plan.num_rows]  # without those of padding

    @in_inference_mode
    def commit(self, plan: StepPlan) -> list[TokenEvent]:
        """Choose the tokens of a step whose passes have run, and make it final."""
        if self._rehearsal is not None:
            self._rehearsal.commit(plan)
            return []
        assert self._found is not None, "a step is committed once all of its passes have run"
        found, self._found = self._found, None
        self._stopwatch.start()
        if isinstance(found, list):
            choice, prompt_told = self._sampler.take(plan, found, self._drafts), {}
        else:
            choice, prompt_told = self._sampler.choose(plan, found, self._drafts), tell_prompt(plan, found)
        self._stopwatch.lap("sampling")
        events = self._commit(plan, choice, prompt_told)
        self._sampler.commit()
        self._stopwatch.lap("scheduler")
        self.draft_seconds = self._clock.seconds()
        if self._times is not None:
            self._note_times(self._times, plan)
        return events

    def _note_times(self, times: StepTimes, plan: StepPlan) -> None:
        first = sum([run.start for run in plan.rings])
        if not times.is_due(len(plan.rings), plan.num_rows, first):
            return
        drafting = sum(self.draft_seconds)
        more = sum([run.start * run.num_drafts for run in plan.drafting])
        times.note_drafts(plan.counts[: len(self.draft_seconds)], more, self.draft_seconds)
        if not plan.scans:
            seconds = perf_counter() - self._begun - drafting
            times.note_full(len(plan.rings), plan.num_rows, first, more, seconds)

    def beside(self, sequences: int) -> None:
        """So many sequences of other workers decode without drafts in the step that begins; rows of prefills may be
        among them.
        """
        self._scheduler.elsewhere = min(sequences, self._scheduler.config.max_seqs)

    @in_inference_mode
    def run(self, plan: StepPlan, dispatcher: Dispatcher) -> list[TokenEvent]:
        """Run all passes of a step and commit it, where there is no gang to walk them with. Raises as `run_pass`."""
        for index in range(len(plan.counts)):
            self.run_pass(plan, index, dispatcher)
        return self.commit(plan)

    def take_events(self) -> list[TokenEvent]:
        """Return the events that no step caused since the last call: cancellations, and grammars that fail."""
        self._queue_compiled()
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        scheduler = self._scheduler
        pages, slots = scheduler.memory.pages, scheduler.memory.slots
        live = [*scheduler.running, *scheduler.waiting]
        compiling = [request.prompt + request.answered for request, _ in self._compiling.values()]
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(compiling),
            queued_tokens=sum(max(len(s.tokens) - s.length - 1, 0) for s in live) + sum(map(len, compiling)),
            free_pages=pages.num_free,
            total_pages=pages.size,
            free_slots=slots.num_free,
            total_slots=slots.size,
            steps=self._steps,
            aborted_steps=self._aborted_steps,
            preemptions=scheduler.preemptions,
            prefill_tokens=self._prefill_tokens,
            generated_tokens=self._generated_tokens,
            drafted_tokens=scheduler.drafts.drafted,
            accepted_tokens=scheduler.drafts.accepted,
            step_seconds=self._stopwatch.totals(),
            aborted_drafting=self._aborted_drafting,
        )

    def _queue(self, request: Request, guide: Guide | None = None) -> None:
        """Queue a request; an answer that another worker has brought to its full length ends without a step."""
        answered = len(request.answered)
        if answered and len(request.prompt) + answered >= self._scheduler.check(request):
            full = TokenEvent(request.request_id, (), None, finish_reason="length", index=answered)
            self._events.append(full)
        else:
            self._scheduler.submit(request, guide)

    def _queue_compiled(self) -> None:
        """Queue the requests whose grammar is compiled, in order of arrival; those without a guide end here."""
        for request_id, (request, compiled) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[request_id]
            guide = compiled.result()
            if guide.error is None:
                # The end of the text ends the answer, even where the request would ignore it.
                self._queue(replace(request, stop_ids=request.stop_ids | guide.eos_ids), guide)
            else:
                self._events.append(TokenEvent(request_id, (), None, finish_reason=guide.ends, error=guide.error))

    def _commit(
        self, plan: StepPlan, choice: Choice, prompt_told: Mapping[Sequence, list[TokenLogprob]]
    ) -> list[TokenEvent]:
        for sequence, told in prompt_told.items():
            assert sequence.prompt_logprobs is not None
            sequence.prompt_logprobs += told
        outcomes = self._scheduler.commit(plan, choice.tokens, choice.ends)
        events = [
            self._event(outcome, choice.logprobs.get(outcome.sequence, ()), choice.failed.get(outcome.sequence))
            for outcome in outcomes
        ]
        self._steps += 1
        self._prefill_tokens += sum([run.num_rows for run in plan.scans])
        self._generated_tokens += sum([len(outcome.token_ids) for outcome in outcomes])
        return events

    def _event(self, outcome: Outcome, told: Iterable[TokenLogprob] = (), error: str | None = None) -> TokenEvent:
        sequence, token_ids, reason, stop_id = outcome
        request = sequence.request
        logprobs = prompt_logprobs = None
        if request.logprobs is not None:
            logprobs = tuple(islice(told, len(token_ids)))  # a stop has one, and is none of them
        collected = sequence.prompt_logprobs
        failed = reason in ("rejected", "error", "lost")
        if collected is not None and len(collected) == len(request.prompt) and not failed and reason != "cancelled":
            prompt_logprobs = tuple(collected)
            sequence.prompt_logprobs = None
        error = error if failed else None  # a request that failed may have been cancelled meanwhile
        counts = sequence.drafted, sequence.accepted, sequence.num_generated - len(token_ids)
        return TokenEvent(request.request_id, token_ids, logprobs, prompt_logprobs, reason, error, stop_id, *counts)
