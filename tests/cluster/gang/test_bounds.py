"""The least number of attention workers changes while the gang runs."""

from __future__ import annotations

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.seats import Address, GangShape


def test_a_new_bound_counts_from_the_next_epoch_on() -> None:
    coordinator = Coordinator(GangShape(2, 0), Address("h", 1), min_attention_workers=1)
    coordinator.join("one", "attention", Address("h"))
    first = coordinator.poll("one", 0.0).membership
    assert first is not None
    coordinator.serving("one", first.epoch)
    coordinator.bound(2)
    status = coordinator.status()
    assert (status.ready, status.epoch) == (True, first.epoch), "the epoch that runs goes on"
    coordinator.left("one", first.epoch, "aborted")
    assert not coordinator.status().ready
    assert coordinator.poll("one", 0.0).membership is None, "one is too few now"
    coordinator.join("two", "attention", Address("h"))
    second = coordinator.poll("two", 0.0).membership
    assert second is not None
    assert len(second.workers) == 2
