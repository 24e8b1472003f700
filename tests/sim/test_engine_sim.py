"""The engine under seeded random traffic and faults, with tight memory; invariants are checked after every action."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Grammars
from divisi.cluster.engine.memory.pool import Pool
from divisi.cluster.engine.memory.sequence_memory import NOTHING
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.sequence import Sequence, Status
from divisi.cluster.engine.step.plan import Leave, Run, StepPlan
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch
from tests.support import tiny_grammar
from tests.support.fake_runner import (
    VOCAB,
    FailingDispatcher,
    FailsAtLast,
    FakeRunner,
    PlainDispatcher,
    solo_answer,
)
from tests.support.ruled_engine import answer, make, serve

GRAMMARS = (
    tiny_grammar.regex("[ab]{4,9}(c[0-9]+){1,3}"),
    tiny_grammar.schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
    'start: thought "end"\nthought[max_tokens=5]: /[a-z]*/',
)
TRACES = 100
TRACES_FULL = 1_500


class Trace:
    """One engine and the traffic that a seed gives it."""

    def __init__(
        self, seed: int, max_draft_tokens: int = 0, source: Grammars | None = None, arrivals: int | None = None
    ) -> None:
        """`source` reads the grammars that some requests then have. `arrivals`: of requests, a few if not given."""
        self.random, self.source = random.Random(seed), source
        pick = self.random.randint
        page_size = self.random.choice([1, 2, 4])
        self.max_len = pick(8, 60)
        enough = -(-self.max_len // page_size)
        max_seqs = pick(1, 8)
        self.config = SchedulerConfig(
            vocab_size=VOCAB,
            max_model_len=self.max_len,
            num_pages=pick(max(1, enough // 2), enough + enough // 2),
            page_size=page_size,
            num_slots=pick(2, max_seqs + 3),
            max_seqs=max_seqs,
            max_step_tokens=pick(max_seqs, max_seqs + 24),
            max_prompt_logit_rows=pick(1, 8),
            max_draft_tokens=max_draft_tokens,
        )
        self.scheduler = Scheduler(self.config)
        self.engine = Engine(
            self._runner(),
            Sampler(),
            self.scheduler,
            device=torch.device("cpu"),
            stopwatch=Stopwatch(),
            grammars=source,
        )
        self.accepted: dict[str, Request] = {}
        self.events: dict[str, list[TokenEvent]] = {}
        self.arrivals = arrivals or pick(1, 14)
        self.operations = 0
        """Arrivals, cancellations, steps and aborts."""

    def _runner(self) -> FakeRunner:
        config, seed = self.config, self.random.getrandbits(32) if self.config.max_draft_tokens else 0
        return FakeRunner(
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_slots=config.num_slots,
            max_rows=1 + config.max_draft_tokens,
            right=random.Random(seed).choice([0.0, 0.5, 0.9, 1.0]),
            seed=seed,
        )

    def run(self) -> None:
        """Serve all arrivals to the end and check every answer."""
        for _ in range(400 * max(self.arrivals, 14)):
            self._arrive()
            self._maybe_cancel()
            self._compiled()
            plan = self.engine.plan()
            self._check()
            if plan is not None:
                self._step(plan)
                self._check()
            elif not self.arrivals:
                break
        else:
            raise AssertionError("requests do not end")
        self._check_answers()

    def _compiled(self) -> None:
        """Grammars are compiled in other threads: a trace must not depend on how fast."""
        compiling = [compiled for _, compiled in self.engine._compiling.values()]
        assert not wait(compiling, timeout=30).not_done

    def _arrive(self) -> None:
        for _ in range(self.random.choice([0, 0, 1, 2]) if self.arrivals else 0):
            self.arrivals -= self.arrivals > 0
            self.operations += 1
            request = self._request(str(len(self.accepted)))
            try:
                self.engine.submit(request)
            except ValueError:
                continue
            self.accepted[request.request_id] = request
            self.events[request.request_id] = []

    def _request(self, name: str) -> Request:
        pick = self.random.randint
        longest = self.random.choice([self.max_len, 4, 4])
        prompt = tuple(pick(0, VOCAB - 1) for _ in range(pick(1, longest)))
        return Request(
            request_id=name,
            prompt=prompt,
            max_tokens=self.random.choice([0, 1, *[pick(1, self.max_len) for _ in range(4)]]),
            sampling=Sampling(
                temperature=self.random.choice([0.0, 0.7, 1.0]),
                top_k=self.random.choice([0, 3]),
                top_p=self.random.choice([1.0, 0.8]),
                seed=self.random.getrandbits(64),
                **(self._rules() if self.config.max_draft_tokens else {}),
            ),
            stop_ids=frozenset(pick(0, VOCAB - 1) for _ in range(self.random.choice([0, 0, 1]))),
            logprobs=self.random.choice([None, None, 2]),
            prompt_logprobs=self.random.choice([None, None, 1]),
            **(self._more() if self.config.max_draft_tokens else {}),
        )

    def _more(self) -> dict[str, Any]:
        """Fields that matter where tokens are drafted: limits of it, rules that look back, grammars."""
        pick = self.random.choice
        fields: dict[str, Any] = {"max_draft_tokens": pick([None, None, 0, 1, 2]), "min_tokens": pick([0, 0, 5])}
        if self.source is not None and pick([True, False, False]):
            fields["grammar"] = pick(GRAMMARS)
        return fields

    def _rules(self) -> dict[str, Any]:
        rng = self.random
        fields: list[dict[str, Any]] = [
            {},
            {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
            {"bad_words": tuple(tuple(rng.choices(range(VOCAB), k=rng.randint(1, 3))) for _ in range(20))},
            {"logit_bias": tuple((token, 2.0) for token in rng.sample(range(VOCAB), 4)), "min_p": 0.02},
            {"allowed_token_ids": tuple(sorted(rng.sample(range(VOCAB), 6))), "frequency_penalty": 1.0},
        ]
        return rng.choice(fields)

    def _maybe_cancel(self) -> None:
        if self.accepted and self.random.random() < 0.05:
            self.engine.cancel(self.random.choice(list(self.accepted)))
            self.operations += 1
        self._note(self.engine.take_events())

    def _step(self, plan: StepPlan) -> None:
        while self.random.random() < 0.15:
            with pytest.raises(StepAborted):
                self.engine.run(plan, self._failing(plan))
            self.operations += 1
            self._maybe_cancel()
            self._check()
        self._maybe_cancel()
        self._note(self.engine.run(plan, PlainDispatcher()))
        self.operations += 1

    def _failing(self, plan: StepPlan) -> PlainDispatcher:
        if self.config.max_draft_tokens:
            return FailsAtLast(self.random.randrange(len(plan.counts) + 1))
        return FailingDispatcher(self.random.randint(0, 1))

    def _note(self, events: list[TokenEvent]) -> None:
        for event in events:
            seen = self.events[event.request_id]
            assert not seen or seen[-1].finish_reason is None, f"{event} after the terminal event"
            seen.append(event)

    def _check(self) -> None:
        scheduler, config = self.scheduler, self.config
        running, waiting = scheduler.running, list(scheduler.waiting)
        arrivals = [sequence.arrival for sequence in [*running, *waiting]]
        assert arrivals == sorted(arrivals), "served out of order"
        holdings, memory = [sequence.holding for sequence in running], scheduler.memory
        held = [page for holding in holdings for page in holding.pages]
        assert len(held) == len(set(held)), "a page in two sequences"
        assert memory.pages.num_used == len(held)
        assert memory.pages.num_free + len(held) == config.num_pages
        slots = [slot for holding in holdings for slot in (holding.slot, *holding.spares) if slot != NOTHING]
        assert len(slots) == len(set(slots)), "a slot in two sequences"
        assert memory.slots.num_free + len(slots) == config.num_slots
        tables = [holding.table for holding in holdings]
        assert len(tables) == len(set(tables)) <= config.max_seqs
        for sequence in waiting:
            self._check_waiting(sequence)
        live = {sequence.request.request_id for sequence in [*running, *waiting]}
        ended = {name for name, events in self.events.items() if events and events[-1].finish_reason}
        live |= set(self.engine._compiling)
        assert live | ended == set(self.accepted), "a request is lost"
        assert not live & ended, "a finished request is still served"

    def _expected(self, request: Request) -> list[int]:
        return undrafted(request, self.max_len)

    @staticmethod
    def _check_waiting(sequence: Sequence) -> None:
        assert sequence.status is Status.WAITING
        assert (sequence.length, sequence.admitted) == (0, None)

    def _check_answers(self) -> None:
        assert self.scheduler.memory.pages.num_free == self.config.num_pages
        assert self.scheduler.memory.slots.num_free == self.config.num_slots
        stats, ends = self.engine.stats(), [events[-1] for events in self.events.values()]
        assert sum(stats.drafted_tokens.values()) == sum(event.drafted for event in ends)
        assert sum(stats.accepted_tokens.values()) == sum(event.accepted for event in ends)
        for name, request in self.accepted.items():
            events = self.events[name]
            assert sum(event.finish_reason is not None for event in events) == 1
            tokens = [token for event in events for token in event.token_ids]
            expected = self._expected(request)
            if events[-1].finish_reason == "cancelled":
                assert tokens == expected[: len(tokens)]
                continue
            assert tokens == expected
            self._check_drafts(request, events)
            told = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
            fails = events[-1].finish_reason == "rejected"  # its rules and its grammar exclude each other
            assert len(told) == (request.prompt_logprobs is not None) or fails
            assert all(len(entries) == len(request.prompt) for entries in told)


    def _check_drafts(self, request: Request, events: list[TokenEvent]) -> None:
        """What an answer's end says of its drafts; the sum over all is that of the engine's counters."""
        drafted, accepted = events[-1].drafted, events[-1].accepted
        assert 0 <= accepted <= drafted
        assert drafted == 0 or request.max_draft_tokens != 0


def run_traces(seeds: range, trace_of: Callable[[int], Trace] = Trace) -> int:
    preemptions = 0
    for seed in seeds:
        trace = trace_of(seed)
        try:
            trace.run()
        except Exception as error:  # whatever it is, the seed must be told
            raise AssertionError(f"trace of seed {seed} fails: {error!r}") from error
        preemptions += trace.scheduler.preemptions
    return preemptions


@cache
def undrafted(request: Request, max_len: int) -> list[int]:
    """The tokens that a request gets alone, without drafts."""
    if request.grammar is None:
        return solo_answer(request, max_len)
    alone = replace(request, max_draft_tokens=0)
    engine = make(tiny_grammar.grammars(), max_model_len=max_len)
    return answer(serve(engine, [alone])[request.request_id])


@pytest.mark.parametrize("quarter", range(4))
def test_random_traces(quarter: int) -> None:
    size = TRACES // 4
    assert run_traces(range(quarter * size, (quarter + 1) * size)) > size // 4, "memory is not tight"


@pytest.mark.verify
@pytest.mark.timeout(1800)
def test_many_random_traces() -> None:
    run_traces(range(TRACES, TRACES_FULL))


def _leak_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back = Pool.give_back
    monkeypatch.setattr(Pool, "give_back", lambda pool, numbers: give_back(pool, list(numbers)[1:]))


def _settle_on_another_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    commit_scan = Scheduler._commit_scan

    def commit(scheduler: Scheduler, run: Run) -> None:
        commit_scan(scheduler, run._replace(leaves=(Leave(run.end, run.sequence.holding.spares[-1]),)))

    monkeypatch.setattr(Scheduler, "_commit_scan", commit)


def _keep_the_length_of_a_preempted_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def keep(scheduler: Scheduler, sequence: Sequence) -> None:
        length = sequence.length
        preempt(scheduler, sequence)
        sequence.length = length

    monkeypatch.setattr(Scheduler, "_preempt", keep)


def _put_the_preempted_last(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler._preempt

    def rotate(scheduler: Scheduler, sequence: Sequence) -> None:
        preempt(scheduler, sequence)
        scheduler.waiting.rotate(-1)

    monkeypatch.setattr(Scheduler, "_preempt", rotate)


def _ignore_cancellation_during_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_is_planned", lambda scheduler, sequence: False)


@pytest.mark.parametrize(
    "plant",
    [
        _leak_a_page,
        _settle_on_another_slot,
        _keep_the_length_of_a_preempted_sequence,
        _put_the_preempted_last,
        _ignore_cancellation_during_a_step,
    ],
)
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="trace of seed"):
        run_traces(range(60))
