"""A gang lasts as long as somebody owns it, and a little longer."""

from __future__ import annotations

from divisi.cluster.gang.membership.lease import OwnerLease
from tests.sim.clock import VirtualClock


def test_a_gang_without_an_owner_lasts_for_one_lease() -> None:
    clock = VirtualClock()
    lease = OwnerLease(30.0, lambda: clock.now)
    clock.pass_time(29.0)
    assert not lease.lapsed, "the first owner may still come"
    assert lease.keep("a"), "whoever keeps it first has it: the former coordinator gave it"
    clock.pass_time(29.0)
    assert not lease.lapsed
    clock.pass_time(1.0)
    assert lease.lapsed


def test_an_owner_hears_that_another_has_taken_its_place() -> None:
    clock = VirtualClock()
    lease = OwnerLease(30.0, lambda: clock.now)
    lease.take("a")
    assert lease.keep("a")
    lease.take("b")
    clock.pass_time(20.0)
    assert not lease.keep("a")
    assert lease.keep("b")
    clock.pass_time(20.0)
    assert not lease.lapsed, "b has kept it"
    assert not lease.keep("a")
    clock.pass_time(10.0)
    assert lease.lapsed, "what a asks for renews nothing"
