from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.errors import RequestRejected, StepAborted
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.model.dispatcher import Dispatcher
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch
from tests.support.fake_runner import VOCAB, FailingDispatcher, FakeRunner, PlainDispatcher, logits_after, solo_answer

MAX_LEN = 64


def make(**changes: Any) -> Engine:
    sizes = {"vocab_size": VOCAB, "max_model_len": MAX_LEN, "num_pages": 64, "page_size": 4, "num_slots": 9}
    limits = {"max_seqs": 8, "max_step_tokens": 24}
    config = SchedulerConfig(**{**sizes, **limits, **changes})
    runner = FakeRunner(num_pages=config.num_pages, page_size=config.page_size, num_slots=config.num_slots)
    return Engine(runner, Sampler(), Scheduler(config), device=torch.device("cpu"), stopwatch=Stopwatch())


def request(name: str, prompt: int = 11, max_tokens: int = 9, **changes: Any) -> Request:
    sampling = changes.pop("sampling", Sampling(temperature=0.0))
    tokens = tuple((len(name) * 7 + ord(name[0]) + 5 * index) % VOCAB for index in range(prompt))
    return Request(name, tokens, max_tokens, sampling, **changes)


MIXED = [
    request("a"),
    request("b", prompt=1, max_tokens=20, sampling=Sampling(seed=1)),
    request("c", prompt=30, max_tokens=30, sampling=Sampling(temperature=0.7, top_p=0.8, seed=2)),
    request("d", prompt=17, sampling=Sampling(temperature=1.3, top_k=5, seed=3)),
    request("e", prompt=4, max_tokens=1),
    request("f", prompt=8, max_tokens=60, sampling=Sampling(seed=2**64 - 1), stop_ids=frozenset({3, 4, 5})),
    request("g", prompt=60, max_tokens=60, sampling=Sampling(seed=9, top_p=0.5)),
]


def run_step(engine: Engine, dispatcher: Dispatcher | None = None) -> list[TokenEvent]:
    plan = engine.plan()
    assert plan is not None
    return engine.run(plan, dispatcher or PlainDispatcher())


def run_all(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while (plan := engine.plan()) is not None:
        for event in engine.run(plan, PlainDispatcher()):
            events.setdefault(event.request_id, []).append(event)
    return events


def answer(events: list[TokenEvent]) -> list[int]:
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("chunk", [1, 3, 8, 24])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_batch_of_all_kinds_gives_each_request_its_solo_answer(chunk: int, page_size: int) -> None:
    engine = make(max_seqs=min(chunk, 8), max_step_tokens=chunk, page_size=page_size, num_pages=400 // page_size)
    for each in MIXED:
        engine.submit(each)
    events = run_all(engine)
    for each in MIXED:
        assert answer(events[each.request_id]) == solo_answer(each, MAX_LEN), each.request_id
    stats = engine.stats()
    assert (stats.free_pages, stats.free_slots) == (stats.total_pages, stats.total_slots)
    assert stats.generated_tokens == sum(len(solo_answer(each, MAX_LEN)) for each in MIXED)
    assert stats.prefill_tokens == sum(len(each.prompt) for each in MIXED)


def test_preemption_changes_no_answer() -> None:
    engine = make(num_pages=20, num_slots=5)
    for each in MIXED:
        engine.submit(each)
    events = run_all(engine)
    assert engine.stats().preemptions > 0
    for each in MIXED:
        assert answer(events[each.request_id]) == solo_answer(each, MAX_LEN), each.request_id


@pytest.mark.parametrize("layer", [0, 1])
def test_an_aborted_step_commits_nothing_and_its_replay_gives_the_same(layer: int) -> None:
    engine = make(num_pages=24, num_slots=5)
    for each in MIXED:
        engine.submit(each)
    events: dict[str, list[TokenEvent]] = {}
    steps = count()
    while (plan := engine.plan()) is not None:
        before = engine.stats()
        for _ in range(next(steps) % 3):
            with pytest.raises(StepAborted, match="expert:0: injected"):
                engine.run(plan, FailingDispatcher(layer))
        assert engine.stats().free_pages == before.free_pages
        assert engine.stats().generated_tokens == before.generated_tokens
        for event in engine.run(plan, PlainDispatcher()):
            events.setdefault(event.request_id, []).append(event)
    for each in MIXED:
        assert answer(events[each.request_id]) == solo_answer(each, MAX_LEN), each.request_id
    assert engine.stats().aborted_steps > 10


def test_stop_id_event() -> None:
    plain = request("a", max_tokens=20)
    tokens = solo_answer(plain, MAX_LEN)
    cut = tokens[6]
    engine = make()
    engine.submit(request("a", max_tokens=20, stop_ids=frozenset({cut})))
    events = run_all(engine)["a"]
    assert answer(events) == tokens[: tokens.index(cut)]
    assert (events[-1].finish_reason, events[-1].stop_id, events[-1].token_ids) == ("stop", cut, ())


def test_cancelling_takes_effect_within_a_step() -> None:
    engine = make()
    for name in "abc":
        engine.submit(request(name))
    run_step(engine)
    engine.cancel("a")
    engine.cancel("a")
    engine.cancel("unknown")
    assert [(event.request_id, event.finish_reason) for event in engine.take_events()] == [("a", "cancelled")]
    assert engine.take_events() == []
    plan = engine.plan()
    assert plan is not None
    engine.cancel("b")
    assert engine.take_events() == []
    events = {event.request_id: event for event in engine.run(plan, PlainDispatcher())}
    assert events["b"].finish_reason == "cancelled"
    assert events["b"].token_ids == ()
    engine.cancel("c")
    assert [(event.request_id, event.finish_reason) for event in engine.take_events()] == [("c", "cancelled")]
    assert engine.plan() is None
    assert engine.stats().free_pages == engine.stats().total_pages


def test_logprobs_of_rows_that_ask() -> None:
    asks = request("a", logprobs=3, sampling=Sampling(temperature=0.5, top_k=4, seed=5))
    engine = make()
    for each in (asks, request("b", logprobs=0), request("c")):
        engine.submit(each)
    events = run_all(engine)
    assert all(event.logprobs is None for event in events["c"])
    assert all(entry.top == () for event in events["b"] for entry in event.logprobs or ())
    tokens = list(asks.prompt)
    for event in events["a"]:
        assert event.logprobs is not None
        (entry,) = event.logprobs
        expected = torch.log_softmax(logits_after(tokens).double(), -1)
        assert entry.token_id == event.token_ids[0]
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)
        tokens.append(entry.token_id)


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("prompt", [1, 2, 30])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_prompt_logprobs_over_chunks(max_tokens: int, prompt: int, rows: int) -> None:
    asks = request("a", prompt=prompt, max_tokens=max_tokens, prompt_logprobs=2)
    engine = make(max_prompt_logit_rows=rows)
    for each in (request("x", prompt=2), asks, request("z", prompt_logprobs=0)):
        engine.submit(each)
    events = run_all(engine)["a"]
    assert answer(events) == solo_answer(asks, MAX_LEN)
    assert events[-1].finish_reason == "length"
    assert all(event.prompt_logprobs is None for event in events[1:])
    told = events[0].prompt_logprobs
    assert told is not None
    assert told[0] is None
    assert len(told) == prompt
    for position, entry in enumerate(told[1:], start=1):
        expected = torch.log_softmax(logits_after(asks.prompt[:position]).double(), -1)
        assert entry is not None
        assert entry.token_id == asks.prompt[position]
        assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=1e-5)
        assert [token for token, _ in entry.top] == expected.topk(2).indices.tolist()


def test_prompt_logprobs_survive_preemption_and_aborts() -> None:
    asks = request("b", prompt=20, max_tokens=20, prompt_logprobs=0)
    engine = make(num_pages=12, max_prompt_logit_rows=2)
    engine.submit(request("a", prompt=2, max_tokens=40))
    engine.submit(asks)
    events: list[TokenEvent] = []
    while (plan := engine.plan()) is not None:
        with pytest.raises(StepAborted):
            engine.run(plan, FailingDispatcher(1))
        events += [event for event in engine.run(plan, PlainDispatcher()) if event.request_id == "b"]
    assert engine.stats().preemptions > 0
    assert answer(events) == solo_answer(asks, MAX_LEN)
    told = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert len(told) == 1
    assert [entry.token_id for entry in told[0] if entry is not None] == list(asks.prompt[1:])


def test_rejection_leaves_the_engine_as_it_was() -> None:
    engine = make()
    with pytest.raises(RequestRejected, match="context of 64"):
        engine.submit(request("a", prompt=64))
    assert engine.plan() is None
    assert engine.take_events() == []


def test_stats_tell_the_queue_and_where_time_went() -> None:
    engine = make(max_seqs=1, max_step_tokens=8)
    engine.submit(request("a", prompt=20))
    engine.submit(request("b", prompt=10))
    run_step(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (1, 1, 1)
    assert stats.queued_tokens == 11 + 9
    assert stats.step_seconds["scheduler"] > 0
    assert stats.step_seconds["sampling"] > 0
