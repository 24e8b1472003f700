"""An engine over the stand-in model, with rules and grammars, driven as the loop around it drives it."""

from __future__ import annotations

import random
from collections import defaultdict
from threading import Event
from typing import Any

import pytest
import torch

from divisi.cluster.engine.engine import Engine
from divisi.cluster.engine.grammar import Grammars
from divisi.cluster.engine.scheduler import Scheduler, SchedulerConfig
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.model.sampling.sampler import Sampler
from divisi.model.stopwatch import Stopwatch
from tests.support.fake_runner import VOCAB, FailingDispatcher, FakeRunner, PlainDispatcher
from tests.support.tiny_grammar import EOS

MAX_LEN = 300


class WaitingEngine(Engine):
    """An engine and what the loop around it does while grammars are compiled and nothing else is to do: wait."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.woken = Event()
        super().__init__(*arguments, wake=self.woken.set, **options)

    def next_plan(self) -> StepPlan | None:
        while (plan := self.plan()) is None and self.stats().waiting:
            assert self.woken.wait(30)
            self.woken.clear()
        return plan


def make(source: Grammars | None, **changes: Any) -> WaitingEngine:
    sizes = {"vocab_size": VOCAB, "max_model_len": MAX_LEN, "num_pages": 400, "page_size": 4, "num_slots": 11}
    limits = {"max_seqs": 8, "max_step_tokens": 24}
    config = SchedulerConfig(**{**sizes, **limits, **changes})
    runner = FakeRunner(num_pages=config.num_pages, page_size=config.page_size, num_slots=config.num_slots)
    scheduler = Scheduler(config)
    device = torch.device("cpu")
    return WaitingEngine(runner, Sampler(), scheduler, device=device, stopwatch=Stopwatch(), grammars=source)


def request(name: str, grammar: str | None = None, **changes: Any) -> Request:
    sampling = Sampling(**({"seed": len(name) * 31 + ord(name[-1])} | changes.pop("sampling", {})))
    prompt = tuple((ord(character) * 5 + index) % VOCAB for index, character in enumerate(name * 3))
    more = {"max_tokens": 40, "stop_ids": frozenset({EOS})} | changes
    return Request(name, prompt, sampling=sampling, grammar=grammar, **more)


def serve(
    engine: WaitingEngine, requests: list[Request], failures: random.Random | None = None
) -> dict[str, list[TokenEvent]]:
    """The events of each request; steps fail at random, more than once."""
    events: dict[str, list[TokenEvent]] = defaultdict(list)
    for each in requests:
        engine.submit(each)
    while (plan := engine.next_plan()) is not None:
        while failures is not None and failures.random() < 0.3:
            with pytest.raises(StepAborted):
                engine.run(plan, FailingDispatcher(failures.randint(0, 1)))
        for event in engine.run(plan, PlainDispatcher()):
            events[event.request_id].append(event)
    for event in engine.take_events():
        events[event.request_id].append(event)
    for name, found in events.items():
        assert [event.finish_reason is not None for event in found] == [False] * (len(found) - 1) + [True], name
    return events


def answer(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]
