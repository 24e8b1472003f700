"""How a change is told: what it waits for, and how long each part of it took."""

from __future__ import annotations

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.seats import Address, GangShape


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_part_is_told() -> None:
    clock = Clock()
    coordinator = Coordinator(GangShape(1, 1), Address("s"), clock=clock, virtual_shards=4)
    coordinator.join("w", "attention", Address("h"))
    coordinator.join("e0", "expert", Address("h", process="expert:0"), 0)
    for holder in ("w", "e0"):
        coordinator.serving(holder, coordinator.poll(holder, 0.0).epoch)
    assert coordinator.scale_status().waits_for == ()
    coordinator.push_stats("e0", {"weight_bytes_read": 1000.0})
    assert coordinator.scale(2).waits_for == ("expert:1 is not there yet",)
    assert coordinator.wanted_shards(1, 60.0) == 2, "at once"
    assert coordinator.wanted_shards(2, 0.0) == 2
    clock.now += 5.0
    new = Applicant("expert:1", "h", 1, age_s=2.0)
    share = coordinator.vacancy(new, 0.0)
    assert share == Share(1, frozenset({2, 3}))
    clock.now += 1.0
    assert coordinator.vacancy(new, 0.0) == share, "asking again begins nothing anew"
    coordinator.join("e1", "expert", Address("h", process="expert:1"), 1, held=share.leaves)
    coordinator.push_stats("e1", {"weight_bytes_read": 500.0})
    assert coordinator.scale_status().waits_for == ("the next epoch",)
    clock.now += 0.5
    leader = coordinator.poll("w", 0.0)
    assert leader.action == "change"
    for holder in ("w", "e0"):
        coordinator.left(holder, leader.epoch, "its membership changes")
    for holder in ("w", "e0", "e1"):
        told = coordinator.poll(holder, 0.0)
        assert told.action == "enter"
        coordinator.serving(holder, told.epoch)
    status = coordinator.scale_status()
    assert (status.expert_shards, status.wanted, status.waits_for, status.bytes_read) == (2, 2, (), 500)
    assert dict(status.seconds) == {"decision": 0.0, "process": 3.0, "imports": 2.0, "load": 1.0, "epoch": 0.5}
    assert status.processes == {"expert:0", "expert:1"}


def test_what_keeps_it_from_coming_is_told() -> None:
    coordinator = Coordinator(GangShape(1, 1), Address("s"))
    coordinator.report_unplaced("no node of the cluster has room for expert:1")
    assert coordinator.scale_status().waits_for == ()
    coordinator.scale(2)
    coordinator.report_failure("expert:1", "OSError: no such file")
    assert coordinator.scale_status().waits_for[-2:] == (
        "expert:1 could not load: OSError: no such file",
        "no node of the cluster has room for expert:1",
    )
