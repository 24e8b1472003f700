"""A rank's threads follow the machine that it runs on, not the one where the gang was described."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from divisi.cluster.cores import CorePlan
from divisi.cluster.gang.loops import threads as threads_module
from divisi.cluster.gang.loops.inbox import Assignment
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.request import Request, Sampling
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.thread_gang import small_spec, thread_gang

pytestmark = pytest.mark.timeout(360)  # the first to need the C++ kernels compiles them, beside other work


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of(rank: int, hosts: str, cores: int, fixed: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a loop's thread computes with once it has entered an epoch of ranks on these hosts."""
    monkeypatch.setattr(threads_module, "usable_cores", lambda: cores)
    addresses = tuple(Address(host) for host in hosts)
    membership = Membership(1, GangShape(1, len(hosts) - 1), tuple(map(str, addresses)), addresses, Address("store"))
    found: list[int] = []

    def enter() -> None:
        CoreShare(fixed).take(Assignment(membership, rank))
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(10)
    return found[0]


@pytest.mark.parametrize(
    ("rank", "hosts", "cores", "fixed", "threads"),
    [
        (0, "a", 6, None, 6),
        (0, "aaab", 6, None, 2),
        (3, "aaab", 6, None, 6),
        (1, "ab", 4, None, 4),
        (2, "aaa", 2, None, 1),
        (0, "aaab", 6, 5, 5),
    ],
)
def test_ranks_share_the_cores_of_their_own_machine(
    monkeypatch: pytest.MonkeyPatch, rank: int, hosts: str, cores: int, fixed: int | None, threads: int
) -> None:
    assert threads_of(rank, hosts, cores, fixed, monkeypatch) == threads


def test_a_step_is_computed_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL_CONFIG | {"num_hidden_layers": 4}, seed=3)
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 3)
    with thread_gang(small_spec(tmp_path, GangShape(1, 0), threads=None)) as (worker,):
        experts, seen = worker.experts, set()
        assert experts is not None
        routed = experts.routed

        def noted(layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return routed(layer, x_TD, expert_ids_TK, gates_TK)

        monkeypatch.setattr(experts, "routed", noted)
        worker.submit(Request("a", (1, 2, 3), 2, Sampling(temperature=0.0)))
        worker.finish("a")
    assert seen == {3}


def test_with_a_plan_a_rank_keeps_to_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Collection[int]] = []
    monkeypatch.setattr(threads_module, "keep_to", kept.append)
    plan = CorePlan(ranks=((0, 1, 2), (3, 4)), service=(5,))
    membership = Membership(1, GangShape(1, 1), ("a", "b"), (Address("here"), Address("here")), Address("store"))
    for rank, fixed, threads in ((0, None, 3), (1, None, 2), (1, 4, 4)):
        CoreShare(fixed, plan).take(Assignment(membership, rank))
        assert torch.get_num_threads() == threads
    assert kept == [(0, 1, 2), (3, 4), (3, 4)]
