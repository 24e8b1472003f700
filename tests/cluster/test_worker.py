"""Attention workers as their replicas hold them, with a coordinator of this process in place of Ray's."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.gang.coordinator import Coordinator
from divisi.cluster.gang.seats import Address, GangShape
from divisi.cluster.ray import worker as worker_module
from divisi.cluster.ray.worker import AttentionRank
from divisi.cluster.spec import GangSpec
from divisi.model.errors import CheckpointError
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.thread_gang import HOST, small_spec


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_checkpoint(path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    return path


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """The one that every worker made here finds. Gangs of one worker and no shard need no store."""
    made = Coordinator(GangShape(1, 0), Address(HOST, 1), lease_s=2.0, grace_s=1.0)
    monkeypatch.setattr(worker_module, "RayCoordinatorClient", lambda name: made)
    monkeypatch.setattr(worker_module, "prepare_process", lambda spec: HOST)
    monkeypatch.setattr(worker_module, "reported", lambda name, who: contextlib.nullcontext())
    return made


@pytest.fixture
def start(coordinator: Coordinator, model_dir: Path) -> Iterator[Callable[[], AttentionRank]]:
    ranks: list[AttentionRank] = []

    def start() -> AttentionRank:
        ranks.append(AttentionRank(small_spec(model_dir, GangShape(1, 0))))
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

    listen_for_real = worker_module.listen
    monkeypatch.setattr(worker_module, "listen", listen)
    return opened


def test_a_worker_that_ends_listens_no_more(
    start: Callable[[], AttentionRank], coordinator: Coordinator, listeners: list[socket.socket]
) -> None:
    start().close()
    assert [listener.fileno() for listener in listeners] == [-1]
    assert "missing attention:0" in coordinator.status().reason


def test_a_colocated_worker_that_cannot_load_gives_its_seat_up(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, coordinator: Coordinator, listeners: list[socket.socket]
) -> None:
    """Its process may live on for a while, and its successor wants the seat."""
    spec: GangSpec = small_spec(model_dir, GangShape(1, 1, colocated=True))
    colocated = Coordinator(spec.shape, Address(HOST, 1), lease_s=60.0)
    monkeypatch.setattr(worker_module, "RayCoordinatorClient", lambda name: colocated)

    def damaged(*_: Any) -> None:
        raise CheckpointError("damaged")

    monkeypatch.setattr(worker_module, "build_engine", damaged)
    with pytest.raises(CheckpointError):
        AttentionRank(spec)
    assert [listener.fileno() for listener in listeners] == [-1]
    assert colocated.join("successor", "attention", Address(HOST, 1)) is not None
