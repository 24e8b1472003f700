"""A shard that was cut off from the coordinator comes back: as a spare where its seat is another's by now."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.gang.membership.coordinator import Coordinator, CoordinatorLost
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, Shard, Worker, new_coordinator, small_spec, thread_gang

from .test_membership import wait_for

ASKED = Request("long", tuple(range(5, 155)), 200, Sampling(0.8, seed=0))


@pytest.fixture(scope="module")
def alone(small_model: Path) -> list[int]:
    with thread_gang(small_spec(small_model, GangShape(1, 0))) as (worker,):
        worker.submit(ASKED)
        return worker.finish(ASKED.request_id)


class Reach:
    """One shard's way to the coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._is_cut = coordinator, False

    def __getattr__(self, name: str) -> Any:
        if self._is_cut:
            raise CoordinatorLost("it is cut off")
        return getattr(self._coordinator, name)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """The coordinator takes the holder of the one shard's seat to be gone."""
        self._is_cut = True
        (held,) = [holder for holder in self._coordinator._roster.holders() if holder.seat.role == "expert"]
        self._coordinator.ended(held.holder_id)
        yield
        self._is_cut = False


@contextlib.contextmanager
def cut_off(small_model: Path) -> Iterator[tuple[Shard, Shard, Worker, Reach]]:
    """A gang that serves: a shard that can be cut off, a spare, a worker."""
    spec = small_spec(small_model, GangShape(1, 1), max_step_tokens=64)
    coordinator = new_coordinator(spec, StoreServer(HOST, CREDENTIALS))
    reach: Any = Reach(coordinator)
    with contextlib.ExitStack() as stack:
        lost, spare, worker = Shard(spec, 0, reach), Shard(spec, None, coordinator), Worker(spec, coordinator)
        for end in (spare, lost, worker):
            stack.callback(end.close)
        wait_for(lambda: coordinator.status().ready, "not ready")
        yield lost, spare, worker, reach


def shown(shard: Shard) -> bytes:
    """To who scrapes it."""
    return generate_latest(shard.rank._telemetry.metrics.registry)


def test_a_shard_that_was_cut_off_is_a_spare_once_another_has_its_seat(small_model: Path, alone: list[int]) -> None:
    with cut_off(small_model) as (lost, spare, worker, reach):
        worker.submit(ASKED)
        worker.wait_for_tokens(ASKED.request_id, 3)
        assert b"divisi_expert_tokens" in shown(lost)
        with reach.cut():
            wait_for(lambda: not spare.rank.is_spare, "the spare does not take the place")
            wait_for(lambda: worker.coordinator.status().ready, "the spare does not serve")
        wait_for(lambda: lost.rank.is_spare, "it does not notice")
        assert lost.rank.experts is None, "it holds its weights still"
        assert b"divisi_expert_tokens" not in shown(lost)
        spare.close()
        wait_for(lambda: not lost.rank.is_spare, "it is of no use any more")
        assert worker.finish(ASKED.request_id) == alone
        assert b"divisi_expert_tokens" in shown(lost)


def test_a_shard_that_is_back_before_the_spare_has_loaded_keeps_its_seat(small_model: Path, alone: list[int]) -> None:
    with cut_off(small_model) as (lost, spare, worker, reach):
        worker.submit(ASKED)
        worker.wait_for_tokens(ASKED.request_id, 3)
        begun, go = threading.Event(), threading.Event()
        load = spare.rank._load

        def slowly(index: int) -> None:
            load(index)
            begun.set()
            assert go.wait(30)

        spare.rank._load = slowly  # type: ignore[method-assign]
        with reach.cut():
            assert begun.wait(30)
        wait_for(lambda: worker.coordinator.status().ready, "it does not come back")
        epoch = worker.coordinator.status().epoch
        go.set()
        wait_for(lambda: spare.rank.is_spare, "the spare keeps what nobody wants")
        assert spare.rank.experts is None
        assert worker.finish(ASKED.request_id) == alone
        assert worker.coordinator.status().epoch == epoch
        assert not lost.rank.is_spare
