"""How a change is told: what it waits for, and how long each part of it took."""

from __future__ import annotations

import pytest

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
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


def served(coordinator: Coordinator) -> Coordinator:
    """A worker and a shard have joined, and are in an epoch."""
    coordinator.join("w", "attention", Address("h"))
    coordinator.join("e0", "expert", Address("h", process="expert:0"), 0)
    for holder in ("w", "e0"):
        coordinator.serving(holder, coordinator.poll(holder, 0.0).epoch)
    return coordinator


def test_a_policy_asks_for_more_shards_by_what_workers_report() -> None:
    clock, rule = Clock(), WaitRule(1, 3, high=0.5, low=0.25, upscale_delay_s=15, downscale_delay_s=60)
    coordinator = served(Coordinator(GangShape(1, 1), Address("s"), clock=clock, virtual_shards=4, wait_rule=rule))
    seconds = {"mixer": 0.0, "experts": 0.0}
    wants = []
    for _ in range(21):
        clock.now += 1.0
        seconds = {"mixer": seconds["mixer"] + 0.3, "experts": seconds["experts"] + 0.7}
        coordinator.poll("w", 0.0, {"step_seconds": dict(seconds), "steps": clock.now, "running": 1.0})
        coordinator.poll("e0", 0.0)
        wants.append(coordinator.scale_status().wanted)
    assert wants == sorted(wants)
    assert wants.index(2) == 14
    assert coordinator.wanted_shards(1, 60.0) == 2, "who starts processes hears of it as ever"
    status = coordinator.scale_status()
    assert status.waits_for == ("expert:1 is not there yet",)
    assert "waited for experts for 70% of that" in status.why
    numbers = coordinator.numbers()
    assert (numbers["expert_shards"], numbers["expert_shards_wanted"]) == (1, 2)
    assert numbers["expert_wait"] == pytest.approx(0.7)


def test_somebody_may_ask_for_what_the_policy_may_have() -> None:
    rule = WaitRule(1, 3, high=0.5, low=0.25, upscale_delay_s=15, downscale_delay_s=60)
    coordinator = served(Coordinator(GangShape(1, 1), Address("s"), virtual_shards=8, wait_rule=rule))
    with pytest.raises(ValueError, match=r"expert_shards=4: gang\.expert_autoscaling keeps them between 1 and 3; ask"):
        coordinator.scale(4)
    status = coordinator.scale(3)
    assert (status.wanted, status.why) == (3, "it was asked for")
    assert coordinator.numbers()["expert_shards_wanted"] == 3


def test_what_somebody_has_asked_for_is_taken_back_where_it_does_not_come() -> None:
    """Only a policy does so."""
    for rule, wanted, why in (
        (WaitRule(1, 3, 0.5, 0.25, 15, 60), 1, "3 of them were not there after 900 s"),
        (None, 3, "it was asked for"),
    ):
        clock = Clock()
        coordinator = served(Coordinator(GangShape(1, 1), Address("s"), clock=clock, virtual_shards=4, wait_rule=rule))
        coordinator.scale(3)
        for _ in range(903):
            clock.now += 1.0
            for holder in ("w", "e0"):
                coordinator.poll(holder, 0.0)
        status = coordinator.scale_status()
        assert (status.expert_shards, status.wanted, status.why) == (1, wanted, why)
        assert bool(status.waits_for) == (rule is None)
