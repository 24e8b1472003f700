"""Processes that have no node are named in the reason, as long as the gang is not ready."""

from __future__ import annotations

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.seats import Address, GangShape


def test_the_reason_names_an_empty_group_until_the_gang_serves() -> None:
    coordinator = Coordinator(GangShape(1, 1), Address("h", 1))
    coordinator.report_unplaced("placement.experts: no node of the cluster has the label a=b")
    assert coordinator.status().reason.endswith("; placement.experts: no node of the cluster has the label a=b")
    for holder, role in (("w", "attention"), ("s", "expert")):
        coordinator.join(holder, role, Address("h", 2))  # type: ignore[arg-type]
    for holder in ("w", "s"):
        epoch = coordinator.poll(holder, 0).epoch
        coordinator.serving(holder, epoch)
    status = coordinator.status()
    assert status.ready
    assert "placement" not in status.reason
    coordinator.leave("s", "its node is gone")
    assert "placement.experts" in coordinator.status().reason
    coordinator.report_unplaced("")
    assert "placement" not in coordinator.status().reason
