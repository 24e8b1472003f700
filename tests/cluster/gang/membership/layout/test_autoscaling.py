"""One change at a time, which is given up where it does not come, and followed by no other where it does not help."""

from __future__ import annotations

from itertools import pairwise

import pytest

from divisi.cluster.gang.membership.layout import autoscaling
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from tests.support.wait_sim import IDLE, Load, ToyGang

RULE = WaitRule(least=1, most=8, high=0.5, low=0.25, upscale_delay_s=20, downscale_delay_s=60)
HOUR = 3600


def test_a_shard_that_does_not_help_is_followed_by_no_other_soon() -> None:
    """All that is waited for is the wire."""
    gang = ToyGang(RULE, 1, seed=1)
    gang.run(3 * HOUR, Load(0.010, 0.001, 0.030))
    times = [at for at, _, _ in gang.changes]
    pauses = [after - before for before, after in pairwise(times)]
    assert gang.numbers() == list(range(2, 2 + len(times)))
    assert len(times) == 7
    assert pauses == sorted(pauses)
    assert pauses[0] > autoscaling.REST_S
    assert pauses[-1] > 16 * autoscaling.REST_S


def test_what_does_not_come_is_given_up() -> None:
    gang = ToyGang(RULE, 1, seed=1, there=False)
    gang.run(int(autoscaling.THERE_WITHIN_S) + 60, Load(0.010, 0.100))
    (first, wants, why), (given_up, back, told) = gang.changes
    assert (wants, back) == (2, 1)
    assert given_up - first == autoscaling.THERE_WITHIN_S
    assert "waited for experts for 91% of that" in why
    assert told == "2 of them were not there after 900 s"
    assert gang.served == gang.wanted == 1
    gang.there = True
    gang.run(HOUR, Load(0.010, 0.100))
    assert gang.served == 8


@pytest.mark.parametrize("before", [0, 60], ids=["by a former coordinator", "by hand"])
def test_what_somebody_else_has_asked_for_is_given_up_too(before: int) -> None:
    gang = ToyGang(RULE, 1, seed=1, there=False)
    gang.run(before, Load(0.010, 0.006))
    gang.ask(6)
    gang.run(int(autoscaling.THERE_WITHIN_S) + 120, Load(0.010, 0.100))
    at, back, why = gang.changes[0]
    assert (at, back, why) == (before + 901.0, 1, "6 of them were not there after 900 s")
    assert gang.numbers() == [1, 2], "it votes again"


def test_fewer_that_somebody_has_asked_for_are_waited_for() -> None:
    gang = ToyGang(RULE, 6, seed=1, there=False)
    gang.ask(4)
    gang.run(int(autoscaling.THERE_WITHIN_S) + 120, Load(0.010, 0.100))
    assert gang.numbers() == []


def test_what_somebody_has_asked_for_is_not_judged() -> None:
    gang = ToyGang(RULE, 1, seed=1)
    gang.run(60, Load(0.010, 0.006))
    gang.ask(4)
    gang.run(10, Load(0.010, 0.006))
    gang.run(40, Load(0.010, 0.200))
    assert gang.numbers() == [5]


def test_whether_a_shard_helps_is_not_told_by_a_lull() -> None:
    gang, wire = ToyGang(RULE, 1, seed=1), Load(0.010, 0.001, 0.030)
    gang.run(HOUR, wire, until=lambda: gang.served == 3)
    gang.run(25, IDLE)
    gang.run(100, wire)
    assert gang.numbers() == [2, 3], "the second that did not help is followed by a rest of two minutes"


def test_no_shard_comes_for_what_one_worker_waits_for_another() -> None:
    gang = ToyGang(RULE, 1, seed=1)
    gang.run(HOUR, Load(0.030, 0.002, lighter_s=0.029))
    assert gang.numbers() == []


def test_the_policy_goes_on_from_what_somebody_has_asked_for() -> None:
    gang = ToyGang(RULE, 1, seed=1)
    rush = Load(0.010, 0.100)
    gang.run(HOUR, rush, until=lambda: gang.wanted == 2)
    gang.ask(6)
    gang.run(20, rush)
    assert gang.numbers() == [2]
    assert gang.served == 6
    gang.run(HOUR, rush)
    assert gang.numbers() == [2, 7, 8]
    gang.ask(1)
    gang.run(60, rush)
    assert gang.numbers()[3:4] == [2], "as if it had never been more"
