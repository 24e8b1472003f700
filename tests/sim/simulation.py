"""One trace: a scheduler under a workload and a virtual clock, checked after every action."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

from divisi.cluster.engine.scheduler import Scheduler
from divisi.cluster.engine.step.plan import Outcome, StepPlan
from divisi.cluster.errors import RequestRejected
from divisi.cluster.request import Request, TokenLogprob
from tests.sim.clock import VirtualClock
from tests.sim.hash_model import VOCAB, HashModel, is_complete
from tests.sim.invariants import Fault, Violation, check_memory, check_plan, check_queues
from tests.sim.ledger import Ledger, Record
from tests.sim.workload import make_workload

_MAX_STEPS = 20_000


class Simulation:
    """The worker's loop around a scheduler: plans, runs, replays aborted steps, commits."""

    def __init__(self, seed: int, scheduler: type[Scheduler] = Scheduler) -> None:
        self._random = random.Random(seed)
        self._workload = work = make_workload(self._random)
        self._clock = VirtualClock()
        self._scheduler = scheduler(work.config)
        self._model = HashModel(work.config)
        self._ledger = Ledger(work.config)
        self.counts: Counter[str] = Counter()
        """What happened in the trace."""
        for time, request in work.arrivals:
            self._clock.at(time, lambda request=request: self._submit(request))  # type: ignore[misc]
        for time, name in work.cancellations:
            self._clock.at(time, lambda name=name: self._cancel(name))  # type: ignore[misc]

    def run(self) -> None:
        """Serve everything to its end. Raises Violation."""
        try:
            self._serve()
        except Violation:
            raise
        except Exception as error:
            raise Violation(Fault.CRASH, f"{type(error).__name__}: {error}") from error
        self.counts += self._ledger.ended
        self.counts["preemptions"] += self._scheduler.preemptions

    @property
    def worst_wait(self) -> float:
        """The largest fraction of its starvation bound that a request has taken."""
        return self._ledger.worst_wait

    def _serve(self) -> None:
        for _ in range(_MAX_STEPS):
            plan = self._scheduler.plan()
            if plan is not None:
                self._check()
                self._step(plan, self._ledger.charge())
            elif self._ledger.unfinished:
                raise Violation(Fault.STARVATION, f"nothing is planned for {list(self._ledger.unfinished)}")
            elif self._clock.is_empty:
                return
            else:
                self._clock.skip_to_next()
        raise Violation(Fault.STARVATION, f"the trace has not ended in {_MAX_STEPS} steps")

    def _step(self, plan: StepPlan, charged: Record | None) -> None:
        check_plan(self._scheduler, plan)
        self._model.grow(plan.growths)
        while self._random.random() < self._workload.abort_rate:
            self._abort(plan)
            self._clock.pass_time(5.0)
        self._clock.pass_time(1.0 + plan.num_rows / 8)
        self._commit(plan, self._model.attempt(plan), charged)

    def _abort(self, plan: StepPlan) -> None:
        """An attempt that gets through a part of the step only; nothing of it may count."""
        self.counts["aborted steps"] += 1
        self._model.attempt(plan, self._random.randint(0, len(plan.runs)))

    def _commit(self, plan: StepPlan, tokens: list[list[int]], charged: Record | None) -> None:
        self.counts["steps"] += 1
        for run in plan.scans:
            collected, prompt = run.sequence.prompt_logprobs, run.sequence.tokens
            for position in run.prompt_positions:
                assert collected is not None
                collected.append(TokenLogprob(prompt[position + 1], -float(position + 1), ()))
        sampled = [run.sequence for run in plan.choosing]
        complete = [item for item in sampled if is_complete(item.request, item.num_generated)]
        tokens = [[] if run.sequence in complete else chosen for run, chosen in zip(plan.runs, tokens, strict=True)]
        outcomes = self._scheduler.commit(plan, tokens, dict.fromkeys(complete, "stop"))
        self._ledger.committed(charged)
        for outcome in outcomes:
            self._tell_prompt(outcome)
            self._ledger.tell(outcome)
        self._check()
        self._ledger.check_waits()

    def _tell_prompt(self, outcome: Outcome) -> None:
        """As the engine does: prompt log-probabilities go out once, when they are complete."""
        sequence = outcome.sequence
        collected = sequence.prompt_logprobs
        if collected is not None and len(collected) == len(sequence.request.prompt):
            if outcome.finish_reason != "cancelled":
                self._ledger.tell_prompt_logprobs(sequence, collected)
            sequence.prompt_logprobs = None

    def _submit(self, request: Request) -> None:
        fits = self._fits(request)
        try:
            sequence = self._scheduler.submit(request)
        except RequestRejected as error:
            self.counts["refused"] += 1
            if fits:
                raise Violation(Fault.WRONG_REFUSAL, f"{request} was refused: {error}") from error
        else:
            if not fits:
                raise Violation(Fault.WRONG_REFUSAL, f"{request} was accepted")
            self._ledger.accept(sequence, request)
            self.counts["begun elsewhere"] += bool(request.answered)
        self._check()

    def _fits(self, request: Request) -> bool:
        """Whether a request can be served alone, by counting the tokens whose KV must be held at its end."""
        config, prompt = self._workload.config, request.prompt
        if request.request_id in self._ledger.unfinished or not prompt or request.max_tokens < 0:
            return False
        if not all(0 <= token < VOCAB for token in prompt) or len(prompt) > config.max_model_len:
            return False
        if request.max_tokens and len(prompt) == config.max_model_len:
            return False
        longest = min(len(prompt) + request.max_tokens, config.max_model_len)
        return max(longest - 1, len(prompt)) <= config.num_pages * config.page_size

    def _cancel(self, request_id: str) -> None:
        planned = self._scheduler.outstanding is not None
        self._ledger.cancel(request_id)
        outcome = self._scheduler.cancel(request_id)
        self.counts["cancellations during a step" if planned and outcome is None else "cancellations"] += 1
        if outcome is not None:
            self._ledger.tell(outcome)
        self._check()

    def _check(self) -> None:
        check_queues(self._scheduler, [record.sequence for record in self._ledger.unfinished.values()])
        check_memory(self._scheduler)


def run_traces(seeds: range, simulation: Callable[[int], Simulation] = Simulation) -> tuple[Counter[str], float]:
    """Run a trace for each seed; return what happened, and the largest fraction of the starvation bound taken.

    Raises Violation, with the seed in its text.
    """
    counts: Counter[str] = Counter()
    worst = 0.0
    for seed in seeds:
        trace = simulation(seed)
        try:
            trace.run()
        except Violation as violation:
            raise Violation(violation.fault, f"trace of seed {seed}: {violation}") from violation
        counts += trace.counts
        worst = max(worst, trace.worst_wait)
    return counts, worst
