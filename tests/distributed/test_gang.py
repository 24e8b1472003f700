"""Real loops over real sockets and groups: the same tokens in every topology, and after losing a process."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from divisi.cluster.dispatch.wire import Transport
from divisi.cluster.engine.grammar import Grammars, Guide
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape, Seat
from tests.support.gang_processes import coordinator_server, rank_processes
from tests.support.plain_mode import Plain
from tests.support.thread_gang import Worker, small_spec, thread_gang

Answers = dict[str, list[int]]


@pytest.fixture(scope="module")
def local_answers(small_model: Path, requests: list[Request]) -> Answers:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*requests)
        return {request.request_id: worker.finish(request.request_id) for request in requests}


SHAPES = [GangShape(1, 1), GangShape(1, 2), GangShape(2, 2), GangShape(1, 3)]
SHAPES += [GangShape(ranks, ranks, colocated=True) for ranks in (1, 2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_topology_gives_the_same_tokens(
    small_model: Path, requests: list[Request], local_answers: Answers, shape: GangShape
) -> None:
    workers = shape.attention_workers
    with thread_gang(small_spec(small_model, shape)) as gang:
        for number, request in enumerate(requests):
            gang[number % workers].submit(request)
        for number, request in enumerate(requests):
            assert gang[number % workers].finish(request.request_id) == local_answers[request.request_id]
        late = Request("late", requests[1].prompt, 24, requests[1].sampling)
        gang[-1].submit(late)  # the gang is parked by now
        assert gang[-1].finish("late") == local_answers["r1"]


def test_a_mode_from_outside_gives_the_same_tokens(
    small_model: Path, requests: list[Request], local_answers: Answers
) -> None:
    def plain(transport: Transport) -> Plain:
        return Plain(
            transport.wire.hidden_size, transport.wire.experts_per_token, transport.deadline_s, transport.wire.leaves
        )

    with thread_gang(small_spec(small_model, GangShape(2, 2)), plain) as gang:
        for number, request in enumerate(requests):
            gang[number % 2].submit(request)
        for number, request in enumerate(requests):
            assert gang[number % 2].finish(request.request_id) == local_answers[request.request_id]


def test_a_slow_grammar_stalls_no_step_of_the_gang(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its request begins as soon as it is compiled, though the gang is parked by then; a broken one is told."""
    begun, let_go = threading.Event(), threading.Event()
    compile_now = Grammars._compile

    def compile_late(grammars: Grammars, grammar: str) -> Guide:
        if "slow" in grammar:
            begun.set()
            assert let_go.wait(60)
        return compile_now(grammars, grammar)

    monkeypatch.setattr(Grammars, "_compile", compile_late)
    slow, broken = "start: /[a-b]{5}/ // slow", "start: /(/ // slow"
    with thread_gang(small_spec(small_model, GangShape(2, 1), step_deadline_s=2.0)) as workers:
        for name, grammar in (("slow", slow), ("broken", broken)):
            workers[0].submit(Request(name, (1, 2, 3), 40, Sampling(temperature=0.0), grammar=grammar))
        assert begun.wait(60)
        for worker in reversed(workers):
            worker.submit(Request("free", (1, 2, 3), 8, Sampling(temperature=0.0)))
            assert len(worker.finish("free")) == 8
            assert worker.loop.ask(worker.engine.stats).result(10).aborted_steps == 0
        let_go.set()
        assert workers[0].finish("slow")
        assert workers[0].events["slow"][-1].finish_reason == "stop"
        assert workers[0].finish("broken") == []
        assert workers[0].events["broken"][-1].finish_reason == "rejected"


def test_cancelling_frees_everything(small_model: Path) -> None:
    with thread_gang(small_spec(small_model, GangShape(1, 1))) as (worker,):
        before = worker.loop.ask(worker.engine.stats).result(10)
        worker.submit(Request("long", (1, 2, 3), 400, Sampling(temperature=0.0)))
        worker.wait_for_tokens("long", 2)
        worker.loop.cancel("long")
        assert len(worker.finish("long")) < 400
        after = worker.loop.ask(worker.engine.stats).result(10)
        assert (after.free_pages, after.free_slots, after.running) == (before.free_pages, before.free_slots, 0)


def test_an_idle_gang_uses_no_processor_time(small_model: Path, record_result: Callable[[str, object], None]) -> None:
    with thread_gang(small_spec(small_model, GangShape(2, 2))) as workers:
        workers[0].submit(Request("warm", (1, 2, 3), 4, Sampling(temperature=0.0)))
        workers[0].finish("warm")
        share = _idle_share()
    record_result("share of a core, four idle ranks with their coordinator", round(share, 4))
    assert share < 0.05


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_an_answer_goes_on_when_a_shard_process_is_lost(
    small_model: Path, fault: signal.Signals, record_result: Callable[[str, object], None]
) -> None:
    spec = small_spec(small_model, GangShape(1, 2), step_deadline_s=2.0)
    request = Request("a", (3, 1, 4, 1, 5), 300, Sampling(temperature=0.8, seed=9))
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (local,):
        local.submit(request)
        want = local.finish("a")
    with coordinator_server(spec) as (coordinator, port), rank_processes(spec, port) as start_shard:
        shards = [start_shard(0), start_shard(1)]
        worker = Worker(spec, coordinator)
        try:
            worker.submit(request)
            worker.wait_for_tokens("a", 5)
            assert shards[1].pid is not None
            os.kill(shards[1].pid, fault)
            lost_at = time.monotonic()
            start_shard(1)
            seen = len(worker.tokens("a"))
            assert seen < 300
            assert worker.finish("a") == want
            assert worker.engine.stats().aborted_steps >= 1
            record_result("seconds from the loss to the answer's end", round(time.monotonic() - lost_at, 2))
        finally:
            worker.close()


@pytest.mark.parametrize("lost", [0, 1], ids=["leader", "follower"])
def test_an_answer_goes_on_when_another_colocated_rank_dies_in_a_layer(
    small_model: Path, lost: int, record_result: Callable[[str, object], None]
) -> None:
    """The replacement takes the seat that is free and loads that seat's experts; the other's answer does not change."""
    spec = small_spec(small_model, GangShape(2, 2, colocated=True), step_deadline_s=5.0)
    requests = [Request(f"r{i}", (3, 1 + i, 4), 120, Sampling(temperature=0.8, seed=i)) for i in range(2)]
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (local,):
        local.submit(*requests)
        want = [local.finish(request.request_id) for request in requests]
    with thread_gang(spec) as gang:
        victim, other = sorted(gang, key=lambda worker: worker.watch.seat != Seat("attention", lost))
        victim.submit(requests[0])
        other.submit(requests[1])
        other.wait_for_tokens("r1", 5)
        lost_at = time.monotonic()
        victim.die_in_a_layer()
        victim.close()
        with contextlib.closing(Worker(spec, victim.coordinator)) as replacement:
            assert replacement.watch.seat == Seat("attention", lost)
            assert len(other.tokens("r1")) < 120, "too late to show anything"
            assert other.finish("r1") == want[1]
            assert other.engine.stats().aborted_steps >= 1
            replacement.submit(requests[0])
            assert replacement.finish("r0") == want[0]
        record_result("seconds from the loss to the answer's end", round(time.monotonic() - lost_at, 2))


def test_a_colocated_gang_with_work_on_one_rank_only(small_model: Path, local_answers: Answers) -> None:
    """Ranks without tokens serve their experts in every layer, and are parked again afterwards."""
    with thread_gang(small_spec(small_model, GangShape(4, 4, colocated=True))) as gang:
        for number, worker in enumerate(gang):
            request = Request(f"r{number}", tuple(range(5, 12)), 24, Sampling(temperature=0.0, seed=0))
            worker.submit(request)
            assert worker.finish(request.request_id) == local_answers["r0"]
        assert _idle_share() < 0.05


def _idle_share() -> float:
    """Of one core, by this process, in the quietest of up to five seconds: who is not parked is busy in each."""
    shares: list[float] = []
    while len(shares) < 5 and not (shares and shares[-1] < 0.05):
        begin, used = time.monotonic(), _cpu_seconds()
        threading.Event().wait(1.0)
        shares.append((_cpu_seconds() - used) / (time.monotonic() - begin))
    return min(shares)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
