"""The parts of the benchmarks of a whole server, without one."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from divisi.benchmarks.served import steps
from divisi.benchmarks.served.cells import Figures, Mix, mixes
from divisi.benchmarks.served.clocks import EngineClock, _path, read_clocks
from divisi.benchmarks.served.nothing import EmptyPlan, IdleEngine, expected_tokens
from divisi.benchmarks.served.report import ALONE, OURS, cost_table, speed_table, verdicts
from divisi.cluster.request import Request, Sampling, TokenEvent
from tests.support.fake_runner import PlainDispatcher


class SpinningEngine:
    """Its steps keep torch's threads busy for a moment."""

    def plan(self) -> EmptyPlan:
        return EmptyPlan(1)

    def run_pass(self, *_: object) -> None:
        torch.ones(2**22).cumsum(0).sin().sum()

    def commit(self, *_: object) -> list[TokenEvent]:
        return []


def test_the_clocks_tell_the_engines_time_from_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divisi.benchmarks.served.clocks.PARTS", {"": "worker"})

    def work() -> None:
        engine = EngineClock().watch(SpinningEngine())
        for _ in range(5):
            plan = engine.plan()
            engine.run_pass(plan, 0, None)
            engine.commit(plan)

    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        first = read_clocks(os.getpid())
        assert first["engine"] > 0.01
        assert 0 <= first["plan"] < first["engine"]
        assert 0 <= first["loop"] < first["engine"]
        assert first["threads"] > 0
        sum(number * number for number in range(300_000))  # of another thread
        second = read_clocks(os.getpid())
        assert second["threads"] > first["threads"] + 0.005
        assert [second[part] for part in ("engine", "plan", "loop")] == [
            first[part] for part in ("engine", "plan", "loop")
        ]
    finally:
        _path(os.getpid()).unlink(missing_ok=True)


def test_an_engine_that_computes_nothing_sends_each_its_tokens() -> None:
    plain = list(range(100, 150))
    engine = IdleEngine(plain)
    for name, count in (("a", 3), ("b", 5), ("c", 9)):
        engine.submit(Request(name, (ord(name), 1), count, Sampling(seed=100)))
    events: dict[str, list[TokenEvent]] = {"a": [], "b": [], "c": []}
    steps_run = 0
    while (plan := engine.plan()) is not None:
        engine.run_pass(plan, 0, PlainDispatcher())
        for event in (*engine.commit(plan), *engine.take_events()):
            events[event.request_id].append(event)
        steps_run += 1
        if steps_run == 7:
            engine.cancel("c")
    for name, count in (("a", 3), ("b", 5)):
        assert [token for event in events[name] for token in event.token_ids] == expected_tokens(
            plain, (ord(name),), count
        )
        assert [event.finish_reason for event in events[name]] == [None] * (count - 1) + ["length"]
    assert expected_tokens(plain, (0,), 5) != expected_tokens(plain, (1,), 5)
    assert [event.finish_reason for event in engine.take_events()] == ["cancelled"]


def test_prompts_are_the_same_for_all_and_new_in_each_round() -> None:
    mix = Mix(3, 16, 2)
    assert mix.prompts(1, 1000) == mix.prompts(1, 1000)
    assert mix.prompts(1, 1000) != mix.prompts(2, 1000)
    assert {(row.streams, row.prompt_tokens) for row in mixes()} == {
        (streams, length) for streams in (1, 8, 32, 64) for length in (16, 256)
    }


def test_losing_rows_are_printed_too() -> None:
    parts = ("engine", "beyond", "plan", "loop", "threads", "ingress", "front", "other", "client")
    slow = {"rate": 500.0, "gap": 60.0, "first": 9.0, **dict.fromkeys(parts, 0.07)}
    rows = {}
    for mix in mixes():
        rows[mix] = {OURS: Figures([slow] * 3), "vllm": Figures([slow]), ALONE: Figures([{**slow, "rate": 1000.0}])}
    assert speed_table(rows).count("vllm") == 8
    assert "0.50x" in speed_table(rows)
    assert cost_table(rows).count("\n") == 9
    found = verdicts(rows).splitlines()
    assert len(found) == 3 + 2 + 3
    assert sum("MISSED" in line for line in found) == 5  # beyond, front and the rates at three concurrencies
    assert sum("met" in line for line in found) == 3


def test_only_an_event_for_every_token_in_every_round_counts() -> None:
    parts = dict.fromkeys(steps._PARTS, 0.01)
    found = {
        8.0: Figures([{"rate": 8000.0, "events": 1.0, "gap": 9.0, **parts}] * 2),
        6.4: Figures([{"rate": 10_000.0, "events": share, "gap": 9.0, **parts} for share in (1.0, 0.9999)]),
    }
    assert "8,000 tokens/s, wanted 10,000: MISSED" in steps.verdict(found)
    assert "10,000 (10,000 to 10,000)" in steps.table(found)
