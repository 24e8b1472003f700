"""Workers that die, leave and fall silent, and an ingress whose journals send on what they had: all from a seed.

Engines are real, over the stand-in model, and draft. What they tell lies in their sockets for a while; with a worker a
part of it is lost. Every answer has to be, event for event, the one that it gets alone and undisturbed.
"""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Event

import torch

from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Grammars
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.sequence import Status
from divisi.cluster.errors import AnswerLost, RequestRejected, StepAborted, WorkerLeft, WorkerLost
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.application.journal import MAX_DEATHS, Journal
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch
from tests.sim.test_engine_sim import Trace
from tests.support.fake_runner import FailsAtLast, PlainDispatcher
from tests.support.ruled_engine import make, serve

FAULTS_FOR = 120
_MAX_TICKS = 4_000


@dataclass(eq=False)
class Answer:
    """What the ingress knows of a request, and what its client was told."""

    request: Request
    journal: Journal
    told: list[TokenEvent] = field(default_factory=list)
    worker: Worker | None = None
    """Who computes the attempt under way."""
    attempt: str = ""
    send_at: int = 0
    deaths: int = 0
    """In a row, without a new token."""
    left: bool = False
    """The client has."""
    mangled: bool = False
    """A message of it was lost on the way, which is not to happen, but not to go unnoticed either."""
    refused: bool = False
    lost: bool = False

    @property
    def has_ended(self) -> bool:
        return self.left or self.refused or self.lost or bool(self.told and self.told[-1].finish_reason)


class Worker:
    """An engine, and what it has told and nobody has read."""

    def __init__(self, trace: Trace) -> None:
        self.scheduler = Scheduler(trace.config)
        self.engine = Engine(
            trace._runner(), Sampler(), self.scheduler, device=torch.device("cpu"), stopwatch=Stopwatch(),
            grammars=trace.source, wake=Event().set,
        )  # fmt: skip
        self.unread: deque[TokenEvent] = deque()
        self.leaving = False

    def submit(self, request: Request) -> None:
        self.engine.submit(request)
        for _, compiled in self.engine._compiling.values():
            compiled.result(30)  # how long it takes in real life is not the seed's


class World:
    """One trace."""

    def __init__(self, seed: int, drafts: int, source: Grammars | None, journal: type[Journal] = Journal) -> None:
        self.trace = Trace(seed, drafts, source)
        self.random = self.trace.random
        self.counts: Counter[str] = Counter()
        self.answers: dict[str, Answer] = {}
        self._journal = journal
        self._tick = 0
        self._seats: list[Worker | None] = [Worker(self.trace) for _ in range(self.random.choice([1, 2, 3]))]
        self._old: list[tuple[Worker, str]] = []
        """Attempts that are to be cancelled where they were given up."""
        self._death_rate = self.random.choice([0.0, 0.02, 0.1])
        self._mangle_rate = self.random.choice([0.0, 0.0, 0.01])

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in self._seats if worker is not None]

    @property
    def has_faults(self) -> bool:
        return self._tick < FAULTS_FOR

    def run(self) -> None:
        while self.trace.arrivals or not all(answer.has_ended for answer in self.answers.values()):
            self._tick += 1
            assert self._tick < _MAX_TICKS, f"no end: {[a for a in self.answers.values() if not a.has_ended]}"
            self._arrive()
            self._send()
            for worker in self.workers:
                self._step(worker)
                self._check_order(worker)
            for worker in self.workers:
                self._read(worker, self.random.randint(0, len(worker.unread)))
            self._disturb()
        for answer in self.answers.values():
            self._check(answer)

    def _arrive(self) -> None:
        for _ in range(self.random.choice([0, 0, 1, 2]) if self.trace.arrivals else 0):
            self.trace.arrivals -= self.trace.arrivals > 0
            request = self.trace._request(str(len(self.answers)))
            request = replace(request, arrived=float(self._tick))
            self.answers[request.request_id] = Answer(request, self._journal(request))

    def _send(self) -> None:
        able = [worker for worker in self.workers if not worker.leaving]
        for answer in self.answers.values():
            if able and answer.worker is None and not answer.has_ended and answer.send_at <= self._tick:
                attempt = answer.journal.attempt()
                answer.worker, answer.attempt = self.random.choice(able), attempt.request_id
                try:
                    answer.worker.submit(attempt)
                except RequestRejected:
                    assert not answer.journal.resumed, "what one worker takes, all do"
                    answer.refused = True

    def _step(self, worker: Worker) -> None:
        """A step of one engine; it may abort, or the worker may die in the middle of it or right after it."""
        engine = worker.engine
        worker.unread += engine.take_events()
        plan = engine.plan()
        worker.unread += engine.take_events()
        if plan is None:
            return
        if self._happens(self._death_rate):
            at = self.random.randrange(len(plan.counts))
            for index in range(at + 1):
                engine.run_pass(plan, index, PlainDispatcher())
            self.counts["between draft and commit"] += bool(plan.drafting)
            self._die(worker)
            return
        aborts = 0
        while self.random.random() < 0.2 and aborts < (1 if plan.alone else 2):  # a request ends that fails alone twice
            aborts += 1
            with suppress(StepAborted):
                engine.run(plan, FailsAtLast(self.random.randrange(len(plan.counts) + 1)))
                raise AssertionError("it is to fail")
            if engine.strike():
                self.counts["taken apart"] += 1
                worker.unread += engine.take_events()
                plan, aborts = engine.plan(), 0
                assert plan is not None, "who was planned goes on, one after another"
        worker.unread += engine.run(plan, PlainDispatcher())
        if self._happens(self._death_rate):
            self._die(worker)

    def _disturb(self) -> None:
        rates = [(self._silence, self._death_rate), (self._leave, 0.01), (self._client_leaves, 0.01)]
        for disturb, rate in rates:
            if self._happens(rate):
                disturb()
        for place, worker in enumerate(self._seats):
            if worker is None and (self.random.random() < 0.3 or not self.has_faults):
                self._seats[place] = Worker(self.trace)
        for worker, attempt in self._old:
            if self.random.random() < 0.5:
                worker.engine.cancel(attempt)

    def _die(self, worker: Worker) -> None:
        """What the kernel had taken of its messages still arrives, the rest does not."""
        self._read(worker, self.random.randint(0, len(worker.unread)))
        unread = {event.request_id: event for event in worker.unread}
        sequences = worker.scheduler._sequences
        for answer in self._of(worker):
            sequence = sequences.get(answer.attempt)
            if sequence is not None and sequence.status is Status.WAITING and not sequence.num_generated:
                self.counts["queued"] += 1
            if sequence is not None and sequence.status is Status.PREFILL and sequence.length:
                self.counts["mid-prefill"] += 1
            if (event := unread.get(answer.attempt)) is not None:
                self.counts["after commit before delivery"] += 1
                self.counts["at the last token"] += event.finish_reason is not None
        self._seats[self._seats.index(worker)] = None
        for answer in self._of(worker):
            self._interrupt(answer, WorkerLost("died"))

    def _silence(self) -> None:
        """A worker that is taken for dead goes on with what it has, until it hears that it is not to."""
        if len(self.workers) > 1:
            worker = self.random.choice(self.workers)
            for answer in self._of(worker):
                self.counts["silence"] += 1
                self._old.append((worker, answer.attempt))
                self._interrupt(answer, WorkerLost("silent"))

    def _leave(self) -> None:
        if self.workers:
            worker = self.random.choice(self.workers)
            worker.leaving = True
            self._read(worker, len(worker.unread))
            for answer in self._of(worker):
                self.counts["left"] += 1
                self._interrupt(answer, WorkerLeft("leaving"))
            self._seats[self._seats.index(worker)] = None

    def _client_leaves(self) -> None:
        answer = self.random.choice([*self.answers.values()] or [None])
        if answer is not None and not answer.has_ended:
            answer.left = True
            if answer.worker is not None:
                answer.worker.engine.cancel(answer.attempt)

    def _interrupt(self, answer: Answer, error: WorkerLost | WorkerLeft) -> None:
        answer.worker, died = None, isinstance(error, WorkerLost)
        answer.deaths += died
        try:
            answer.journal.interrupted(error)
        except AnswerLost:
            assert died
            assert answer.deaths == MAX_DEATHS + 1, f"given up after {answer.deaths} deaths"
            self.counts["lost"] += 1
            answer.lost = True
        else:
            assert answer.deaths <= MAX_DEATHS, f"goes on after {answer.deaths} deaths"
            answer.send_at = self._tick + self.random.randint(0, 3) + int(4 * answer.journal.stand_back_s)
            self.counts["resent"] += 1

    def _read(self, worker: Worker, count: int) -> None:
        for _ in range(count):
            event = worker.unread.popleft()
            answer = self.answers[event.request_id.partition("#")[0]]
            if answer.has_ended or not self._is_current(answer, worker, event):
                continue
            if event.finish_reason is None and self._happens(self._mangle_rate):
                if self.random.random() < 0.5:
                    answer.mangled = True
                    continue
                self._tell(answer, event)
            self._tell(answer, event)

    def _is_current(self, answer: Answer, worker: Worker, event: TokenEvent) -> bool:
        """The ingress gives every attempt a number of its own on the worker's connection, and forgets it."""
        return answer.worker is worker and answer.attempt == event.request_id

    def _tell(self, answer: Answer, event: TokenEvent) -> None:
        if answer.has_ended:
            return
        try:
            fresh = answer.journal.take([event])
        except AnswerLost:
            assert answer.mangled, "a hole where nothing was lost"
            self.counts["holes"] += 1
            answer.lost = True
            return
        answer.told += fresh
        if any(each.token_ids for each in fresh):
            answer.deaths = 0

    def _of(self, worker: Worker) -> list[Answer]:
        return [answer for answer in self.answers.values() if answer.worker is worker and not answer.has_ended]

    def _happens(self, rate: float) -> bool:
        return self.has_faults and self.random.random() < rate

    def _check_order(self, worker: Worker) -> None:
        """Who waits, waits in the order in which they came to the ingress."""
        names = [sequence.request.request_id.partition("#")[0] for sequence in worker.scheduler.waiting]
        came = [self.answers[name].request.arrived for name in names]
        assert came == sorted(came), f"{names} wait in another order than they came"

    def _check(self, answer: Answer) -> None:
        if answer.refused:
            return
        told, whole = answer.told, alone(answer.request, self.trace.config, self.trace.source is not None)
        tokens = [token for event in told for token in event.token_ids]
        expected = [token for event in whole for token in event.token_ids]
        assert tokens == expected[: len(tokens)], f"{answer.request}: {tokens}, not {expected}"
        for event in told:
            assert event.request_id == answer.request.request_id
            assert event.logprobs is None or len(event.logprobs) == len(event.token_ids)
        logprobs = [entry for event in told for entry in event.logprobs or ()]
        assert logprobs == [entry for event in whole for entry in event.logprobs or ()][: len(logprobs)]
        prompts = [event.prompt_logprobs for event in told if event.prompt_logprobs is not None]
        assert len(prompts) <= 1, "prompt log-probabilities come once"
        drafted = [event.drafted for event in told if not event.finish_reason or event.token_ids]
        assert drafted == sorted(drafted), "counts of drafts go up"
        if answer.left or answer.lost:
            return
        end, own = told[-1], whole[-1]
        assert tokens == expected
        assert (end.finish_reason, end.stop_id, end.error) == (own.finish_reason, own.stop_id, own.error)
        assert prompts == [event.prompt_logprobs for event in whole if event.prompt_logprobs is not None]
        self.counts["whole"] += 1


@cache
def alone(request: Request, config: SchedulerConfig, grammars: bool) -> list[TokenEvent]:
    """The events of a request that nothing disturbs, beside nobody and without drafts."""
    from tests.support import tiny_grammar

    engine = make(tiny_grammar.grammars() if grammars else None, max_model_len=config.max_model_len)
    return serve(engine, [request])[request.request_id]
