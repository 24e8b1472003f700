"""A coordinator dies under running steps, and a rank falls silent: real loops, sockets and groups, no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.gang.membership.coordinator import Coordinator, CoordinatorLost
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from tests.support.credentials import CREDENTIALS
from tests.support.gang_processes import coordinator_server, rank_processes
from tests.support.thread_gang import HOST, Shard, Worker, leaves_of, new_coordinator, small_spec, thread_gang

TOKENS = 400
ASKED = [Request(f"r{i}", (7 + i, 8, 9), TOKENS, Sampling(0.8, seed=i)) for i in range(2)]


@pytest.fixture(scope="module")
def alone(small_model: Path) -> dict[str, list[int]]:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*ASKED)
        return {request.request_id: worker.finish(request.request_id) for request in ASKED}


def two_and_one(small_model: Path, **changes: object) -> GangSpec:
    shape = GangShape(2, 1)
    return small_spec(small_model, shape, min_attention_workers=1, step_deadline_s=30.0, **changes)


class Replaceable:
    """Whichever coordinator there is, if any."""

    def __init__(self, current: Coordinator) -> None:
        self.current: Coordinator | None = current

    def __getattr__(self, name: str) -> Any:
        if self.current is None:
            raise CoordinatorLost("there is none")
        return getattr(self.current, name)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def aborted(worker: Worker) -> int:
    return worker.loop.ask(worker.engine.stats).result(20).aborted_steps


def test_steps_go_on_without_a_coordinator_and_under_the_next(small_model: Path, alone: dict[str, list[int]]) -> None:
    spec, former_store = two_and_one(small_model), StoreServer(HOST, CREDENTIALS)
    former = new_coordinator(spec, former_store)
    relay: Any = Replaceable(former)
    with contextlib.ExitStack() as stack:
        for end in (Shard(spec, 0, relay), first := Worker(spec, relay), second := Worker(spec, relay)):
            stack.callback(end.close)
        wait_for(lambda: former.status().workers == 2 and former.status().ready, "not everybody is let in")
        epoch = former.status().epoch
        first.submit(ASKED[0])
        second.submit(ASKED[1])
        first.wait_for_tokens("r0", 5)
        relay.current = None
        del former_store  # the ranks have met, and need no store any more
        seen = len(first.tokens("r0"))
        first.wait_for_tokens("r0", seen + 20)
        next_store = StoreServer(HOST, CREDENTIALS)
        relay.current = latter = Coordinator(
            spec.shape, next_store.address, first_epoch=10_000, min_attention_workers=1, spec=spec.fingerprint,
            gather_s=60.0, virtual_shards=leaves_of(spec),
        )  # fmt: skip
        wait_for(lambda: latter.status().ready, "the epoch is not adopted")
        assert latter.status().epoch == epoch
        for worker, request in ((first, ASKED[0]), (second, ASKED[1])):
            assert worker.finish(request.request_id) == alone[request.request_id]
            assert aborted(worker) == 0
        second.leave()
        wait_for(lambda: latter.status().workers == 1, "the adopted gang cannot change")
        assert latter.status().epoch == 10_000


@pytest.mark.parametrize("silent", ["a worker", "the leader"])
def test_who_falls_silent_is_fenced_and_comes_back(
    small_model: Path, alone: dict[str, list[int]], silent: str, record_result: Callable[[str, object], None]
) -> None:
    spec = two_and_one(small_model, suspect_after_s=1.0)
    busy = Request("v", (1, 2, 3), TOKENS, Sampling())
    with coordinator_server(spec) as (coordinator, port), rank_processes(spec, port) as start:
        start(0)
        if silent == "the leader":
            stopped = start(Request("v", (1, 2, 3), 2, Sampling()))
            wait_for(lambda: coordinator.status().workers == 1, "the first does not serve")
        with contextlib.closing(Worker(spec, coordinator)) as worker:
            if silent == "a worker":
                wait_for(lambda: coordinator.status().workers == 1, "the first does not serve")
                stopped = start(busy)
            wait_for(lambda: coordinator.status().workers == 2 and coordinator.status().ready, "not two")
            worker.submit(*ASKED)
            worker.wait_for_tokens("r0", 5)
            assert stopped.pid is not None
            begin = time.monotonic()
            os.kill(stopped.pid, signal.SIGSTOP)
            wait_for(lambda: coordinator.status().workers == 1 and coordinator.status().ready, "it is not left out")
            fenced_s = time.monotonic() - begin
            record_result(f"{silent} falls silent: seconds until an epoch without it serves", round(fenced_s, 2))
            assert 0.5 < fenced_s < 15.0, "half of the deadline that it would take by itself"
            os.kill(stopped.pid, signal.SIGCONT)
            wait_for(lambda: coordinator.status().workers == 2, "it does not come back")
            assert {request.request_id: worker.finish(request.request_id) for request in ASKED} == alone
