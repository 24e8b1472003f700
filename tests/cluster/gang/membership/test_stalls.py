"""How long a gang stood still, and why."""

from __future__ import annotations

from collections.abc import Mapping

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.stalls import CAUSES, Stalls
from divisi.cluster.gang.membership.vacancies import Applicant
from divisi.cluster.seats import Address, GangShape


class Gang:
    """A coordinator whose holders do at once what they are told, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.coordinator = Coordinator(
            GangShape(2, 1), Address("s"), clock=lambda: self.now, virtual_shards=4, min_attention_workers=1
        )
        self.join("w0", "attention")
        self.join("e0", "expert", 0)
        self.meet("w0", "e0")

    def join(self, who: str, role: str, index: int | None = None) -> None:
        held = None if index is None else self.coordinator._roster.plan._layouts.first_share(index)  # type: ignore[union-attr]
        self.coordinator.join(who, role, Address("h", process=who), index, held=held)  # type: ignore[arg-type]

    def meet(self, *holders: str) -> None:
        """The next epoch's, and the last one of them as late as it is now."""
        told = [self.coordinator.poll(who, 0.0) for who in holders]
        assert {directive.action for directive in told} == {"enter"}
        for who, directive in zip(holders, told, strict=True):
            self.coordinator.serving(who, directive.epoch)

    def change(self, *holders: str) -> None:
        """The leader is told that the epoch is to change, and all leave it."""
        directive = self.coordinator.poll("w0", 0.0)
        assert directive.action == "change"
        for who in holders:
            self.coordinator.left(who, directive.epoch, "its membership changes")

    def seconds(self) -> dict[str, float]:
        """By cause; of each there was one stall at most."""
        numbers = self.coordinator.numbers()
        seconds, counts = numbers["stall_seconds"], numbers["stalls"]
        assert isinstance(seconds, Mapping)
        assert isinstance(counts, Mapping)
        assert set(seconds) == set(counts) == set(CAUSES)
        assert max(counts.values()) <= 1
        return {cause: seconds[cause] for cause in CAUSES if counts[cause]}


def test_the_first_epoch_ends_no_stall() -> None:
    assert Gang().seconds() == {}


def test_each_cause_has_its_time() -> None:
    gang = Gang()
    gang.join("w1", "attention")
    gang.now += 2.0
    gang.change("w0", "e0")
    gang.now += 0.25
    gang.meet("w0", "w1", "e0")
    assert gang.seconds() == {"changed": 0.25}

    gang.coordinator.scale(2)
    gang.coordinator.vacancy(Applicant("e1", "h", 1), 0.0)
    gang.join("e1", "expert", 1)
    gang.now += 2.0
    gang.change("w0", "w1", "e0")
    gang.now += 0.5
    assert gang.seconds() == {"changed": 0.25}, "it is not over"
    gang.meet("w0", "w1", "e0", "e1")
    assert gang.seconds() == {"changed": 0.25, "scaled": 0.5}

    gang.now += 0.5
    gang.coordinator.ended("w1")
    gang.now += 1.0
    epoch = gang.coordinator.poll("w0", 0.0).epoch
    for who in ("w0", "e0", "e1"):
        gang.coordinator.left(who, epoch, "attention:1 has died", "attention:1")
    gang.now += 1.0
    gang.meet("w0", "e0", "e1")
    assert gang.seconds() == {"changed": 0.25, "scaled": 0.5, "broken": 2.0}


def test_an_epoch_that_breaks_before_it_serves_prolongs_the_stall() -> None:
    stalls = Stalls()
    stalls.look(serves=True, orderly=False, change="", now=0.0)
    for orderly, now in ((True, 1.0), (True, 2.0), (False, 3.0), (True, 4.0)):
        stalls.look(serves=False, orderly=orderly, change="moved", now=now)
    stalls.look(serves=True, orderly=True, change="moved", now=6.0)
    assert stalls.numbers()["stall_seconds"] == {"scaled": 0.0, "moved": 0.0, "changed": 0.0, "broken": 5.0}
