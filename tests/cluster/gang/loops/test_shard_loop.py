"""A shard's loop serves, in each epoch, what that epoch's layout says."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from divisi.cluster.dispatch.protocol import Experts, Peers, ShardEnd
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.loops import shard_loop
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.gang.loops.shard_loop import ShardLoop
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.passes import PassLayers
from divisi.cluster.seats import Address, GangShape
from divisi.model.experts import LeavesNotHeld
from divisi.model.placement import Layout, share_of
from tests.support.credentials import CREDENTIALS
from tests.support.gangs import CPU, DenseExperts, membership_of

SHAPE, LEAVES = GangShape(1, 3), 8
WEIGHTS = torch.zeros(1, LEAVES, 4, 4)


@dataclass
class Bank:
    """Holds some leaves."""

    held: set[int]
    num_leaves = LEAVES

    def serving(self, layout: Layout, seat: int) -> DenseExperts:
        if not self.held.issuperset(layout.served[seat]):
            raise LeavesNotHeld(f"{layout.served[seat]} is not held")
        return DenseExperts(WEIGHTS, share_of(LEAVES, layout.leaves, layout.served[seat]))


@dataclass
class Reports:
    told: queue.Queue[str]

    def serving(self, epoch: int) -> None:
        self.told.put(f"serving {epoch}")

    def left(self, epoch: int, reason: str, blamed: object) -> None:
        self.told.put(f"left {epoch}: {reason}")


@dataclass
class Once:
    """A mode whose epochs end at once; knows what it was to serve."""

    served: list[tuple[int, ...]]

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        assert isinstance(experts, DenseExperts)
        self.served.append(experts.share.expert_ids)
        raise StepAborted("enough")


def test_each_epoch_has_its_layout_and_what_is_not_held_costs_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def links(assignment: Assignment, *_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(peers=Peers.of(assignment.membership, assignment.rank, lambda _: None))  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(shard_loop, "shard_links", links)
    inbox, mode, bank, reports = EpochInbox(), Once([]), Bank({3, 4, 5}), Reports(queue.Queue())
    cores, layers = CoreShare(1), PassLayers(full=(0,))
    loop = ShardLoop(bank, mode, layers, CPU, cores, CREDENTIALS, inbox, reports)  # type: ignore[arg-type]
    thread = threading.Thread(target=loop.run)
    thread.start()

    def epoch(number: int, layout: Layout | None) -> str:
        membership = membership_of(SHAPE, Address("s"), number, layout)
        rank = [str(seat) for seat in membership.seats].index("expert:1")
        inbox.offer(Assignment(membership, rank))
        return reports.told.get(timeout=10)

    try:
        assert epoch(1, None) == "left 1: enough"
        assert epoch(2, Layout(LEAVES, ((0, 1, 2), (3, 5), (4, 6, 7)))) == "left 2: enough"
        assert epoch(3, Layout(LEAVES, ((0, 2, 4, 6), (1, 3, 5, 7), ()))) == "left 3: (1, 3, 5, 7) is not held"
        bank.held = {1, 3, 5, 7}
        assert epoch(4, Layout(LEAVES, ((0, 2, 4, 6), (1, 3, 5, 7), ()))) == "left 4: enough"
    finally:
        inbox.stop()
        thread.join(10)
    assert not thread.is_alive()
    assert mode.served == [(3, 4, 5), (3, 5), (1, 3, 5, 7)]
