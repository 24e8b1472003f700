"""What ingresses have no room for reaches the workers, by the coordinator, on a clock that the test moves."""

from __future__ import annotations

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.refused_demand import RefusedDemand
from divisi.cluster.seats import Address, GangShape


def test_each_ingress_counts_until_it_falls_silent() -> None:
    now = 0.0
    refused = RefusedDemand(lambda: now)
    refused.report("a", 300)
    refused.report("b", 50)
    assert refused.tokens() == 350
    now = 1.5
    refused.report("a", 100)
    assert refused.tokens() == 150
    now = 3.0
    assert refused.tokens() == 100
    now = 4.0
    assert refused.tokens() == 0


def test_the_workers_are_told_whatever_else_they_are_told() -> None:
    now = 0.0
    coordinator = Coordinator(GangShape(1, 0), Address("h", 1), clock=lambda: now)
    coordinator.join("worker", "attention", Address("h"))
    coordinator.report_open("ingress", 8, 640)
    entering = coordinator.poll("worker", 0.0)
    assert (entering.action, entering.refused_tokens) == ("enter", 640)
    assert coordinator.poll("worker", 0.0).refused_tokens == 640
    assert coordinator.numbers()["refused_tokens"] == 640
    coordinator.report_open("ingress", 8)
    assert coordinator.poll("worker", 0.0).refused_tokens == 0
