"""Attention workers that come, go and die: the others' answers are the same, and their steps are not aborted for it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.transport.groups import join_group
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.errors import StepAborted
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from tests.support.credentials import CREDENTIALS
from tests.support.gang_processes import coordinator_server, rank_processes
from tests.support.gangs import CPU, membership_of
from tests.support.thread_gang import HOST, Shard, Worker, new_coordinator, small_spec, thread_gang

TOKENS = 200
LONG = [Request(f"long{i}", tuple(range(5 + i, 155 + i)), TOKENS, Sampling(0.8, seed=i)) for i in range(3)]
"""Prompts that take many steps, of any share."""


@pytest.fixture(scope="module")
def alone(small_model: Path) -> dict[str, list[int]]:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*LONG)
        return {request.request_id: worker.finish(request.request_id) for request in LONG}


def elastic(small_model: Path, workers: int = 2) -> GangSpec:
    shape = GangShape(workers, 1)
    return small_spec(small_model, shape, min_attention_workers=1, max_step_tokens=64, step_deadline_s=30.0)


def aborted(worker: Worker) -> int:
    return worker.loop.ask(worker.engine.stats).result(20).aborted_steps


class HeldShard(Shard):
    """Its experts wait until they may go on."""

    def __init__(self, *args: Any) -> None:
        self.go_on, self.asked = threading.Event(), threading.Event()
        super().__init__(*args)

    def loaded(self, experts: MeteredExperts) -> None:
        compute = experts.measured

        def measured(*args: Any) -> Any:
            self.asked.set()
            assert self.go_on.wait(60)
            return compute(*args)

        experts.measured = measured  # type: ignore[method-assign]


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        threading.Event().wait(0.01)


def test_a_worker_comes_and_goes_between_two_steps(small_model: Path, alone: dict[str, list[int]]) -> None:
    """The plan that is under way when the second comes is larger than the first's new share, and is given up."""
    spec = elastic(small_model)
    store = StoreServer(HOST, CREDENTIALS)
    coordinator = new_coordinator(spec, store)
    with contextlib.ExitStack() as stack:
        shard = HeldShard(spec, 0, coordinator)
        stack.callback(shard.close)
        first = Worker(spec, coordinator)
        stack.callback(first.close)
        resized: list[bool] = []
        resize = first.engine.resize

        def note(rows: int, *, crowded: bool) -> bool:
            resized.append(resize(rows, crowded=crowded))
            return resized[-1]

        first.engine.resize = note  # type: ignore[method-assign]
        wait_for(lambda: coordinator.status().workers == 1, "one worker is enough")
        epoch = coordinator.status().epoch
        first.submit(LONG[0])
        assert shard.asked.wait(30), "no step"
        second = Worker(spec, coordinator)
        stack.callback(second.close)
        wait_for(lambda: first._inbox.is_changing(epoch), "the leader is not told")
        assert coordinator.status().workers == 1, "not in the middle of a step"
        shard.go_on.set()
        wait_for(lambda: coordinator.status().workers == 2, "the second is not let in")
        assert coordinator.status().ready
        wait_for(lambda: resized[-1:] == [True], "no plan was given up")
        first.submit(LONG[1])
        second.submit(LONG[2])
        second.wait_for_tokens("long2", 5)
        first.wait_for_tokens("long0", 5)
        assert aborted(second) == 0
        second.leave()
        wait_for(lambda: coordinator.status().workers == 1, "the second has not left")
        assert coordinator.status().ready
        assert len(first.tokens("long0")) < TOKENS, "too late to show anything"
        for name in ("long0", "long1"):
            assert first.finish(name) == alone[name]
        assert aborted(first) == 0


def test_the_leader_goes_and_the_next_one_leads(small_model: Path, alone: dict[str, list[int]]) -> None:
    with thread_gang(elastic(small_model)) as workers:
        coordinator = workers[0].coordinator
        wait_for(lambda: coordinator.status().workers == 2, "not everybody is let in")
        leader, other = sorted(workers, key=lambda worker: str(worker.watch.seat))
        other.submit(*LONG)
        other.wait_for_tokens("long0", 5)
        leader.watch.retire(20)
        assert len(other.tokens("long0")) < TOKENS, "too late to show anything"
        leader.close()
        assert {request.request_id: other.finish(request.request_id) for request in LONG} == alone
        assert (aborted(other), coordinator.status().workers) == (0, 1)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_killed_worker_is_left_out_at_once(
    small_model: Path, alone: dict[str, list[int]], busy: bool, record_result: Callable[[str, object], None]
) -> None:
    """Nobody waits for its lease, nor for who takes its seat."""
    spec = elastic(small_model)
    with coordinator_server(spec) as (coordinator, port), rank_processes(spec, port) as start:
        start(0)
        with contextlib.closing(Worker(spec, coordinator)) as worker:
            wait_for(lambda: coordinator.status().workers == 1, "the first does not serve", 60)
            victim = start(*(Request(f"v{i}", (1, 2, 3), 400 if busy else 1, Sampling()) for i in range(8)))
            wait_for(lambda: coordinator.status().workers == 2, "the second is not let in", 60)
            worker.submit(*LONG)
            times: list[float] = []
            deliver = worker.loop._deliver

            def note(events: Any) -> None:
                times.append(time.monotonic())
                deliver(events)

            worker.loop._deliver = note
            worker.wait_for_tokens("long0", 5)
            epoch = coordinator.status().epoch
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGKILL)
            assert len(worker.tokens("long0")) < TOKENS, "too late to show anything"
            assert {request.request_id: worker.finish(request.request_id) for request in LONG} == alone
            assert coordinator.status().epoch > epoch
            assert coordinator.status().workers == 1
            pause_s = max(later - earlier for earlier, later in pairwise(times))
            what = f"seconds of pause when the other worker, {'busy' if busy else 'idle'}, is killed"
            record_result(what, round(pause_s, 3))
            assert pause_s < 2.0


def test_who_meets_a_group_waits_for_nobody_who_has_gone() -> None:
    store = StoreServer(HOST, CREDENTIALS)
    membership = membership_of(GangShape(1, 1), store.address)

    def gone() -> None:
        raise StepAborted("epoch 1 is over")

    with pytest.raises(StepAborted, match="epoch 1 is over"):
        join_group(membership, 0, CPU, 20.0, CREDENTIALS, gone)
    with pytest.raises(StepAborted, match="expert:0: did not come"):
        join_group(membership, 0, CPU, 0.05, CREDENTIALS)


def test_a_rank_of_another_spec_gets_no_seat(small_model: Path) -> None:
    spec = elastic(small_model)
    with thread_gang(spec) as workers:
        coordinator = workers[0].coordinator
        wait_for(lambda: coordinator.status().workers == 2, "not everybody is let in")
        workers[1].leave()
        other = small_spec(small_model, spec.shape, min_attention_workers=1, max_step_tokens=64, page_size=16)
        with contextlib.closing(Worker(other, coordinator)) as stranger:
            wait_for(lambda: stranger.watch._wanting_since is not None, "it has not asked")
            assert stranger.watch.seat is None
            assert coordinator.status().workers == 1


def test_a_spare_takes_the_place_of_a_shard_that_ends(small_model: Path, alone: dict[str, list[int]]) -> None:
    """It has no weights before; afterwards the former one is the spare. Tokens are those of an undisturbed run."""
    spec = elastic(small_model)
    store = StoreServer(HOST, CREDENTIALS)
    coordinator = new_coordinator(spec, store)
    with contextlib.ExitStack() as stack:
        first, spare = Shard(spec, 0, coordinator), Shard(spec, None, coordinator)
        stack.callback(spare.close)
        worker = Worker(spec, coordinator)
        stack.callback(worker.close)
        wait_for(lambda: coordinator.status().ready, "not ready")
        assert spare.rank.is_spare
        assert spare.rank.experts is None, "it holds no memory yet"
        worker.submit(LONG[0])
        worker.wait_for_tokens(LONG[0].request_id, 3)
        first.close()
        wait_for(lambda: not spare.rank.is_spare, "it does not take the place")
        again = Shard(spec, 0, coordinator)
        stack.callback(again.close)
        assert worker.finish(LONG[0].request_id) == alone[LONG[0].request_id]
        assert again.rank.is_spare
