"""A gang whose router sends most rows to one shard's experts: virtual shards move beside the answers, whose tokens are
the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from divisi.cluster.gang.membership import watch
from divisi.cluster.gang.membership.layout import leaf_loads
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import GangShape
from divisi.cluster.telemetry import ranks
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.thread_gang import Worker, small_spec, thread_gang

from .test_adoption import wait_for
from .test_scaling import Gang, gang_of

TOKENS = 200
ASKED = [Request(f"r{i}", tuple(range(3 + i, 12 + 5 * i)), TOKENS, Sampling(0.7, seed=30 + i)) for i in range(4)]

pytestmark = pytest.mark.verify


@pytest.fixture(scope="module")
def hot_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first eight of sixteen experts get most rows: their logits are spread eight times as widely."""
    path = tmp_path_factory.mktemp("model") / "hot"
    write_random_checkpoint(path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensor[:8] *= 8
        save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.fixture
def quick_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is counted, reports come ten times a second, and a window is as long as five of them."""
    monkeypatch.setattr(ranks, "_MEASURED_EVERY", 1)
    monkeypatch.setattr(watch, "_POLL_S", 0.1)
    monkeypatch.setattr(leaf_loads, "WINDOW_S", 0.5)


def answered(worker: Worker, batch: int) -> list[list[int]]:
    """The same four requests, by names of their own."""
    asked = [dataclasses.replace(request, request_id=f"{request.request_id} {batch}") for request in ASKED]
    worker.submit(*asked)
    return [worker.finish(request.request_id) for request in asked]


def number(gang: Gang, name: str) -> float:
    value = gang.coordinator.numbers()[name]
    assert isinstance(value, (int, float))
    return value


@pytest.mark.parametrize(("shards", "copies"), [(2, 0), (4, 0), (2, 1)])
def test_a_hot_set_is_shared_out_beside_answers(
    hot_model: Path, shards: int, copies: int, quick_reports: None, record_result: Callable[[str, object], None]
) -> None:
    with thread_gang(small_spec(hot_model, GangShape(1, 0))) as (worker,):
        alone = answered(worker, 0)
    with gang_of(small_spec(hot_model, GangShape(1, shards), rebalance=True, expert_copies=copies)) as gang:
        wait_for(lambda: gang.coordinator._roster.settled is not None, "copies are not loaded")
        first, epoch = gang.read(), gang.coordinator.status().epoch
        seen = []
        for batch in range(60):
            assert answered(gang.worker, batch) == alone
            seen.append(number(gang, "expert_imbalance"))
            if number(gang, "expert_moves") and seen[-1] < 1.2:
                break
        record_result(f"imbalance, {shards} shards, {copies} copies", [round(value, 2) for value in seen])
        record_result("moves, bytes moved", [number(gang, "expert_moves"), number(gang, "expert_moved_bytes")])
        assert max(seen) > 1.5, "nothing is planted"
        assert seen[-1] < 1.2
        assert 1 <= number(gang, "expert_moves") <= gang.coordinator.status().epoch - epoch <= 20
        assert gang.worker.engine.stats().aborted_steps == 0, "each change was between two steps"
        wait_for(lambda: gang.coordinator._roster.settled is not None, "a move does not end")
        read = sum(gang.read()) - sum(first)
        wait_for(lambda: number(gang, "expert_moved_bytes") == read, f"{read} bytes were read")
        assert read == 0 if copies else 0 < read < sum(first)
