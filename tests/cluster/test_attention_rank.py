"""Attention workers as their replicas hold them, with a coordinator of this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster import attention_rank as rank_module
from divisi.cluster.attention_rank import AttentionRank, WorkerFailed
from divisi.cluster.errors import GangNotReady, WorkerLost
from divisi.cluster.gang.membership import watch as watch_module
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.cluster.seats import Address, GangShape
from divisi.cluster.spec import GangSpec
from divisi.cluster.streams.client import WorkerConnection
from divisi.cluster.streams.workers import WorkerConnections
from divisi.model.errors import CheckpointError
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, post_of, small_spec


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_checkpoint(path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    return path


@pytest.fixture
def coordinator(model_dir: Path) -> Coordinator:
    """The one that every worker made here finds. Gangs of one worker and no shard need no store."""
    spec = small_spec(model_dir, GangShape(1, 0)).fingerprint
    return Coordinator(GangShape(1, 0), Address(HOST, 1), lease_s=2.0, grace_s=1.0, spec=spec)


@pytest.fixture
def start(coordinator: Coordinator, model_dir: Path) -> Iterator[Callable[[], AttentionRank]]:
    ranks: list[AttentionRank] = []

    def start() -> AttentionRank:
        ranks.append(AttentionRank(small_spec(model_dir, GangShape(1, 0)), post_of(coordinator)))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.close()


@pytest.fixture
def listeners(monkeypatch: pytest.MonkeyPatch) -> list[socket.socket]:
    """Every control listener that is opened."""
    opened: list[socket.socket] = []

    def listen(host: str) -> socket.socket:
        opened.append(listen_for_real(host))
        return opened[-1]

    listen_for_real = rank_module.listen
    monkeypatch.setattr(rank_module, "listen", listen)
    return opened


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError(otherwise)


@contextlib.asynccontextmanager
async def connected(rank: AttentionRank) -> AsyncIterator[WorkerConnection]:
    """An ingress's connection to a worker."""
    connections = WorkerConnections(HOST, CREDENTIALS.secret)
    address = rank._watch._candidate.address.streams
    assert address is not None
    connections.name([address])
    async with asyncio.timeout(10):
        while address not in connections._open:
            await asyncio.sleep(0.01)
    try:
        yield connections._open[address]
    finally:
        await connections.close()


async def answer(rank: AttentionRank, name: str) -> int:
    """Tokens of an answer; TimeoutError where there is none."""
    async with connected(rank) as connection, asyncio.timeout(10):
        stream = connection.open(Request(name, (1, 2, 3), 4, Sampling(temperature=0.0)))
        events = await stream.take()
        while events[-1].finish_reason is None:
            events += await stream.take()
    return sum(len(event.token_ids) for event in events)


def test_a_worker_without_a_seat_refuses_at_once_until_it_has_one(
    start: Callable[[], AttentionRank], coordinator: Coordinator
) -> None:
    first = start()
    wait_until(lambda: coordinator.status().ready, "the first worker got no seat")
    spare = start()
    assert asyncio.run(answer(first, "a")) == 4
    with pytest.raises(GangNotReady, match="no seat"):
        asyncio.run(answer(spare, "b"))
    spare.check()  # it may go on waiting for a seat
    first.close()
    wait_until(lambda: coordinator.status().ready, "the spare did not take the seat")
    assert asyncio.run(answer(spare, "c")) == 4


def test_what_an_event_can_hold_arrives(start: Callable[[], AttentionRank], coordinator: Coordinator) -> None:
    """Of a real engine, whose numbers come from tensors."""
    rank = start()
    wait_until(lambda: coordinator.status().ready, "it got no seat")
    asked = Request("a", (1, 2, 3), 3, Sampling(seed=7), logprobs=2, prompt_logprobs=1)

    async def ask() -> list[TokenEvent]:
        async with connected(rank) as connection, asyncio.timeout(20):
            stream = connection.open(asked)
            events = await stream.take()
            while events[-1].finish_reason is None:
                events += await stream.take()
        return events

    events = asyncio.run(ask())
    told = events[0].prompt_logprobs
    assert told is not None
    assert [entry and entry.token_id for entry in told] == [None, 2, 3]
    assert all(entry is None or len(entry.top) == 1 for entry in told)
    for event in events:
        assert event.logprobs is not None
        assert [entry.token_id for entry in event.logprobs] == list(event.token_ids)
        assert all(len(entry.top) == 2 for entry in event.logprobs)


def test_the_ingresses_are_told_of_workers_with_a_seat(
    start: Callable[[], AttentionRank], coordinator: Coordinator
) -> None:
    first = start()
    wait_until(lambda: coordinator.status().ready, "the first worker got no seat")
    start()
    assert coordinator.status().streams == (first._watch._candidate.address.streams,)


def test_a_worker_that_leaves_keeps_its_seat_until_its_answers_have_ended(
    start: Callable[[], AttentionRank], coordinator: Coordinator
) -> None:
    rank = start()
    wait_until(lambda: coordinator.status().ready, "it got no seat")

    async def leave() -> int:
        async with connected(rank) as connection, asyncio.timeout(30):
            stream = connection.open(Request("a", (1, 2, 3), 200, Sampling(temperature=0.0)))
            events = await stream.take()
            closing = asyncio.create_task(asyncio.to_thread(rank.close, 20.0))
            while events[-1].finish_reason is None:
                events += await stream.take()
            await closing
            assert events[-1].finish_reason == "length"
            return sum(len(event.token_ids) for event in events)

    assert asyncio.run(leave()) == 200
    assert "missing attention:0" in coordinator.status().reason


def test_a_worker_whose_step_fails_hands_its_answers_back_and_takes_no_more(
    start: Callable[[], AttentionRank], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = start()
    wait_until(lambda: coordinator.status().ready, "it got no seat")

    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rank._engine, "run_pass", broken)

    async def ask() -> None:
        async with connected(rank) as connection, asyncio.timeout(10):
            with pytest.raises(WorkerLost, match="the attention worker failed"):
                await connection.open(Request("a", (1, 2, 3), 4, Sampling())).take()
            with pytest.raises(GangNotReady, match=r"out of memory|no seat"):
                await connection.open(Request("b", (1, 2, 3), 4, Sampling())).take()

    asyncio.run(ask())
    with pytest.raises(WorkerFailed, match="out of memory"):
        rank.check()


def test_a_worker_whose_seat_another_has_taken_is_to_be_replaced(
    start: Callable[[], AttentionRank], coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its requests would wait for the seat until they time out."""
    monkeypatch.setattr(watch_module, "_RETRY_S", 0.02)
    monkeypatch.setattr(watch_module, "_GIVE_UP_S", 0.3)
    rank = start()
    wait_until(lambda: coordinator.status().ready, "it got no seat")
    (holder,) = coordinator._roster.holders()
    coordinator.leave(holder.holder_id, "not heard of for too long")
    spec = coordinator._roster.spec
    assert coordinator.join("another", "attention", Address(HOST, 1), index=0, spec=spec) is not None
    rank.check()

    def failed() -> bool:
        coordinator.poll("another", 0.0)
        with contextlib.suppress(WorkerFailed):
            rank.check()
            return False
        return True

    wait_until(failed, "it does not say that it has lost its seat")


def test_a_worker_that_ends_listens_no_more(
    start: Callable[[], AttentionRank], coordinator: Coordinator, listeners: list[socket.socket]
) -> None:
    start().close()
    assert [listener.fileno() for listener in listeners] == [-1]
    assert "missing attention:0" in coordinator.status().reason


def test_a_colocated_worker_that_cannot_load_gives_its_seat_up(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, listeners: list[socket.socket]
) -> None:
    """Its process may live on for a while, and its successor wants the seat."""
    spec: GangSpec = small_spec(model_dir, GangShape(1, 1, colocated=True))
    colocated = Coordinator(spec.shape, Address(HOST, 1), lease_s=60.0, spec=spec.fingerprint)

    def damaged(*_: Any) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr(rank_module, "build_engine", damaged)
    with pytest.raises(CheckpointError):
        AttentionRank(spec, post_of(colocated))
    assert [listener.fileno() for listener in listeners] == [-1]
    assert colocated.join("successor", "attention", Address(HOST, 1), spec=spec.fingerprint) is not None
