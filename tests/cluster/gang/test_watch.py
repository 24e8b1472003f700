"""A seat is kept through a coordinator that cannot be reached for a moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from divisi.cluster.gang import watch as watch_module
from divisi.cluster.gang.coordinator import Coordinator, CoordinatorLost
from divisi.cluster.gang.inbox import EpochInbox
from divisi.cluster.gang.seats import Address, GangShape
from divisi.cluster.gang.watch import Candidate, SeatWatch

ADDRESS = Address("127.0.0.1", 1)


class Flaky(Coordinator):
    """Loses the next `left` report on its way, as a broken connection does."""

    lose_left = False

    def left(self, holder_id: str, epoch: int, reason: str) -> None:
        if self.lose_left:
            self.lose_left = False
            raise CoordinatorLost("the call did not arrive")
        super().left(holder_id, epoch, reason)


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]]]:
    monkeypatch.setattr(watch_module, "_RETRY_S", 0.02)
    monkeypatch.setattr(watch_module, "_POLL_S", 0.05)
    watches: list[SeatWatch] = []

    def start(connect: Callable[[], Coordinator]) -> tuple[SeatWatch, EpochInbox]:
        inbox = EpochInbox()
        watch = SeatWatch(connect, Candidate("attention", ADDRESS), inbox, lambda: None)
        watches.append(watch)
        watch.start()
        return watch, inbox

    yield start
    for watch in watches:
        watch.stop("the test is over")


def next_epoch(inbox: EpochInbox) -> int:
    for _ in range(400):
        if (assignment := inbox.take()) is not None:
            return assignment.membership.epoch
        threading.Event().wait(0.02)
    raise AssertionError("no epoch was offered")


def test_a_lost_report_does_not_hold_up_the_next_epoch(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    coordinator = Flaky(GangShape(1, 0), ADDRESS, lease_s=0.5, grace_s=0.2)
    watch, inbox = start(lambda: coordinator)
    first = next_epoch(inbox)
    coordinator.lose_left = True
    watch.left(first, "a step was aborted")
    assert next_epoch(inbox) > first


def test_an_unexpected_error_does_not_end_the_watch(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    coordinator = Coordinator(GangShape(1, 0), ADDRESS)
    errors = [RuntimeError("nobody expected this")]

    def connect() -> Coordinator:
        if errors:
            raise errors.pop()
        return coordinator

    _, inbox = start(connect)
    assert next_epoch(inbox) == 1
