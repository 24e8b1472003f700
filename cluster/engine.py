"""One attention worker's engine: requests in, token events out, one step at a time.

Plain Python and tensors; no Ray, no threads, no clock. The loop around it agrees on each step with the gang:

    plan = engine.plan()
    events = engine.run(plan, dispatcher)     # on StepAborted: run the same plan again, in the next epoch

Shapes: R rows of logits, V vocabulary, L rows whose log-probabilities are asked for.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from divisi.cluster.errors import StepAborted
from divisi.cluster.plan import Outcome, StepPlan
from divisi.cluster.request import Request, TokenEvent, TokenLogprob
from divisi.cluster.scheduler import Scheduler
from divisi.cluster.sequence import Sequence
from divisi.cluster.stats import EngineStats
from divisi.cluster.step_batch import BatchBuilder
from divisi.model.batch import StepBatch
from divisi.model.dispatcher import Dispatcher
from divisi.model.sampling import Logprobs, RowSampling, Sampler, SamplingBatch, token_logprobs
from divisi.model.stopwatch import Stopwatch


class Runner(Protocol):
    """The model and its memory: `model.runner.ModelRunner`, or a stand-in."""

    def forward(self, batch: StepBatch, dispatcher: Dispatcher) -> Tensor:
        """Run one step; return the fp32 logits [R, V] of `batch.logit_rows_R`, valid until the next call.

        Running the same batch again after an aborted run gives the same logits and leaves the same state.
        """
        ...


class Engine:
    """Schedules, runs and commits the steps of one attention worker."""

    def __init__(
        self, runner: Runner, sampler: Sampler, scheduler: Scheduler, *, device: torch.device, stopwatch: Stopwatch
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._scheduler = scheduler
        self._stopwatch = stopwatch
        self._builder = BatchBuilder(scheduler.config, device)
        self._events: list[TokenEvent] = []
        self._sampled: list[Sequence] = []
        self._sampling = SamplingBatch(())
        self._steps = self._aborted_steps = self._prefill_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, so that `plan` would return a plan."""
        return self._scheduler.has_work

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRejected if it can never be served."""
        self._scheduler.submit(request)

    def cancel(self, request_id: str) -> None:
        """End a request now or, if the step under way includes it, with that step. Unknown ids are ignored."""
        outcome = self._scheduler.cancel(request_id)
        if outcome is not None:
            self._events.append(self._event(outcome))

    def plan(self) -> StepPlan | None:
        """Plan the next step, to be run (again, if it aborts) or dropped; None when there is nothing to do."""
        self._stopwatch.start()
        plan = self._scheduler.plan()
        if plan is not None:
            self._builder.grow(plan.growths)
        self._stopwatch.lap("scheduler")
        return plan

    def run(self, plan: StepPlan, dispatcher: Dispatcher) -> list[TokenEvent]:
        """Run a step and commit it. When this raises (StepAborted), nothing was committed: run the plan again."""
        with torch.inference_mode():
            self._stopwatch.start()
            batch = self._builder.build(plan)
            self._stopwatch.lap("scheduler")
            try:
                logits_RV = self._runner.forward(batch, dispatcher)
            except StepAborted:
                self._aborted_steps += 1
                raise
            tokens, logprobs = self._choose(plan, logits_RV)
            prompt_logprobs = _prompt_logprobs(plan, logits_RV)
            self._stopwatch.lap("sampling")
        events = self._commit(plan, tokens, logprobs, prompt_logprobs)
        self._stopwatch.lap("scheduler")
        return events

    def drop(self, plan: StepPlan) -> None:
        """Give up a plan that will not be run; its sequences are planned anew."""
        self._events += [self._event(outcome) for outcome in self._scheduler.drop(plan)]

    def fail_all(self, message: str) -> None:
        """End every request with an error, for a worker that cannot go on; drops the plan under way."""
        self._events += [self._event(outcome, error=message) for outcome in self._scheduler.end_all("error")]

    def take_events(self) -> list[TokenEvent]:
        """Return the events that no step caused since the last call: cancellations and failures."""
        events, self._events = self._events, []
        return events

    def stats(self) -> EngineStats:
        """Return a snapshot of the counters."""
        scheduler = self._scheduler
        live = [*scheduler.running, *scheduler.waiting]
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            queued_tokens=sum(max(len(s.tokens) - s.length - 1, 0) for s in live),
            free_pages=scheduler.pages.num_free,
            total_pages=scheduler.pages.num_pages,
            free_slots=scheduler.slots.num_free,
            total_slots=scheduler.slots.num_slots,
            steps=self._steps,
            aborted_steps=self._aborted_steps,
            preemptions=scheduler.preemptions,
            prefill_tokens=self._prefill_tokens,
            generated_tokens=self._generated_tokens,
            step_seconds=self._stopwatch.totals(),
        )

    def _choose(self, plan: StepPlan, logits_RV: Tensor) -> tuple[list[int], dict[Sequence, TokenLogprob]]:
        """Sample a token for each decode and each chunk that samples, with the log-probabilities asked for."""
        sampled = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks if chunk.samples)]
        if not sampled:
            return [], {}
        if sampled != self._sampled:
            self._sampled, self._sampling = sampled, SamplingBatch([_row_sampling(sequence) for sequence in sampled])
        if len(sampled) != logits_RV.shape[0]:
            logits_RV = logits_RV[_sample_rows(plan)]
        positions_R = np.array([len(sequence.tokens) for sequence in sampled])
        result = self._sampler.sample(logits_RV, self._sampling, positions_R)
        tokens: list[int] = result.token_ids_R.tolist()
        if result.logprobs is None:
            return tokens, {}
        rows = self._sampling.logprob_rows
        asked = [sampled[row] for row in rows]
        limits = [sequence.request.logprobs or 0 for sequence in asked]
        told = _told(result.logprobs, [tokens[row] for row in rows], limits)
        return tokens, dict(zip(asked, told, strict=True))

    def _commit(
        self,
        plan: StepPlan,
        tokens: list[int],
        logprobs: dict[Sequence, TokenLogprob],
        prompt_logprobs: dict[Sequence, list[TokenLogprob]],
    ) -> list[TokenEvent]:
        for sequence, told in prompt_logprobs.items():
            assert sequence.prompt_logprobs is not None
            sequence.prompt_logprobs += told
        outcomes = self._scheduler.commit(plan, tokens)
        events = [self._event(outcome, logprobs.get(outcome.sequence)) for outcome in outcomes]
        self._steps += 1
        self._prefill_tokens += plan.num_tokens - len(plan.decodes)
        self._generated_tokens += sum([len(outcome.token_ids) for outcome in outcomes])
        return events

    def _event(self, outcome: Outcome, logprob: TokenLogprob | None = None, error: str | None = None) -> TokenEvent:
        sequence, token_ids, reason, stop_id = outcome
        request = sequence.request
        logprobs = prompt_logprobs = None
        if request.logprobs is not None:
            logprobs = (logprob,) if token_ids and logprob is not None else ()
        collected = sequence.prompt_logprobs
        if collected is not None and len(collected) == len(request.prompt) and reason not in ("cancelled", "error"):
            prompt_logprobs = tuple(collected)
            sequence.prompt_logprobs = None
        return TokenEvent(request.request_id, token_ids, logprobs, prompt_logprobs, reason, error, stop_id)


def _row_sampling(sequence: Sequence) -> RowSampling:
    sampling = sequence.request.sampling
    return RowSampling(
        sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, logprobs=sequence.request.logprobs
    )


def _sample_rows(plan: StepPlan) -> list[int]:
    """Which rows of the step's logits choose tokens; the others are for prompt log-probabilities."""
    rows = list(range(len(plan.decodes)))
    end = len(rows)
    for chunk in plan.chunks:
        end += len(chunk.logit_positions())
        if chunk.samples:
            rows.append(end - 1)
    return rows


def _prompt_logprobs(plan: StepPlan, logits_RV: Tensor) -> dict[Sequence, list[TokenLogprob]]:
    """The log-probabilities of the prompt tokens that this step's chunks tell."""
    told = {}
    row = len(plan.decodes)
    for chunk in plan.chunks:
        sequence = chunk.sequence
        positions = sequence.prompt_positions(chunk.start, chunk.end)
        if positions:
            num_top = sequence.request.prompt_logprobs or 0
            targets = sequence.tokens[positions.start + 1 : positions.stop + 1]
            targets_L = torch.tensor(targets, device=logits_RV.device)
            found = token_logprobs(logits_RV[row : row + len(positions)], targets_L, num_top)
            told[sequence] = _told(found, targets, [num_top] * len(targets))
        row += len(chunk.logit_positions())
    return told


def _told(logprobs: Logprobs, token_ids: list[int], limits: list[int]) -> list[TokenLogprob]:
    """Make the records of L rows, each with as many alternatives as its request asks for."""
    chosen: list[float] = logprobs.chosen_L.tolist()
    top_ids: list[list[int]] = logprobs.top_ids_LN.tolist()
    top: list[list[float]] = logprobs.top_LN.tolist()
    return [
        TokenLogprob(token_id, value, tuple(zip(ids[:limit], values[:limit], strict=True)))
        for token_id, value, ids, values, limit in zip(token_ids, chosen, top_ids, top, limits, strict=True)
    ]
