"""Gangs on GPUs whose rows travel by NCCL, each rank a process of its own. They share a card where there is only one.

NCCL refuses two ranks of one host on one card, so each says that it is a host of its own, and rows go through sockets:
what is shown is that nothing is lost or confused, not how fast it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.spec import GangSpec
from tests.support.gang_processes import coordinator_server, rank_processes
from tests.support.thread_gang import Worker, small_spec, thread_gang

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here, which NCCL needs"),
    pytest.mark.timeout(240),
]
TOKENS = 40
FINISH_S = 100.0
ASKED = [Request(f"r{i}", (3, 1 + i, 4, 1, 5), TOKENS, Sampling(0.8 * (i % 2), seed=9 + i)) for i in range(4)]
SHAPES = [GangShape(1, 1), GangShape(1, 2), GangShape(2, 2), GangShape(2, 2, colocated=True)]

StartRank = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def alone(small_model: Path) -> dict[str, list[int]]:
    """The tokens of one process on the CPU."""
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(*ASKED)
        return {request.request_id: worker.finish(request.request_id) for request in ASKED}


def spec_of(small_model: Path, shape: GangShape) -> GangSpec:
    return small_spec(small_model, shape, device="cuda", kernels="reference", step_deadline_s=10.0, suspect_after_s=1.0)


@contextlib.contextmanager
def ranks(spec: GangSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Coordinator, StartRank]]:
    """A coordinator, and what starts a rank in a process of its own, on what NCCL takes for a host of its own."""
    for name, value in {"SOCKET_IFNAME": "lo", "P2P_DISABLE": "1", "SHM_DISABLE": "1", "IB_DISABLE": "1"}.items():
        monkeypatch.setenv(f"NCCL_{name}", value)
    started = iter(range(1, 100))
    with coordinator_server(spec) as (coordinator, port), rank_processes(spec, port) as start:

        def start_apart(rank: int | Request, *more: Request) -> BaseProcess:
            os.environ["NCCL_HOSTID"] = f"rank-{next(started)}"
            try:
                return start(rank, *more)
            finally:
                os.environ["NCCL_HOSTID"] = "tests"

        yield coordinator, start_apart


def start_all(spec: GangSpec, start: StartRank) -> list[BaseProcess]:
    """All but one worker."""
    shape = spec.shape
    shards = [] if shape.colocated else [start(index) for index in range(shape.expert_shards)]
    for _ in range(shape.attention_workers - 1):
        start(Request("other", (7, 8, 9), TOKENS, Sampling()))
    return shards


def finished(worker: Worker) -> dict[str, list[int]]:
    return {request.request_id: worker.finish(request.request_id, FINISH_S) for request in ASKED}


@pytest.mark.parametrize("shape", SHAPES, ids=["1x1", "1x2", "2x2", "colocated"])
def test_a_gang_on_gpus_answers_as_one_process_on_a_cpu(
    small_model: Path,
    alone: dict[str, list[int]],
    shape: GangShape,
    monkeypatch: pytest.MonkeyPatch,
    record_result: Callable[[str, object], None],
) -> None:
    spec = spec_of(small_model, shape)
    with ranks(spec, monkeypatch) as (coordinator, start):
        start_all(spec, start)
        with contextlib.closing(Worker(spec, coordinator)) as worker:
            worker.submit(*ASKED)
            begin = time.monotonic()
            assert finished(worker) == alone
            assert worker.engine.stats().aborted_steps == 0
            record_result(f"seconds for {TOKENS} tokens of {len(ASKED)}", round(time.monotonic() - begin, 2))


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_an_answer_goes_on_when_a_shard_on_a_gpu_is_lost(
    small_model: Path,
    alone: dict[str, list[int]],
    fault: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    record_result: Callable[[str, object], None],
) -> None:
    spec = spec_of(small_model, GangShape(1, 2))
    with ranks(spec, monkeypatch) as (coordinator, start):
        shards = start_all(spec, start)
        with contextlib.closing(Worker(spec, coordinator)) as worker:
            worker.submit(*ASKED)
            worker.wait_for_tokens("r0", 5)
            assert shards[1].pid is not None
            os.kill(shards[1].pid, fault)
            lost_at = time.monotonic()
            start(1)
            assert len(worker.tokens("r0")) < TOKENS, "too late to show anything"
            assert finished(worker) == alone
            assert worker.engine.stats().aborted_steps >= 1
            record_result("seconds from the loss to the answers' end", round(time.monotonic() - lost_at, 2))
