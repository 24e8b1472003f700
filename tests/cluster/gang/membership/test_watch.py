"""A seat is kept through a coordinator that cannot be reached for a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.membership import watch as watch_module
from divisi.cluster.gang.membership.coordinator import Coordinator, CoordinatorLost
from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.gang.membership.watch import Candidate, SeatWatch
from divisi.cluster.seats import Address, GangShape, Role, Seat

ADDRESS = Address("127.0.0.1", 1)


class Flaky(Coordinator):
    """Loses the next `left` report on its way, as a broken connection does."""

    lose_left = False

    def left(self, holder_id: str, epoch: int, reason: str, suspect: str | None = None) -> None:
        if self.lose_left:
            self.lose_left = False
            raise CoordinatorLost("the call did not arrive")
        super().left(holder_id, epoch, reason, suspect)


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


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    for _ in range(400):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError(otherwise)


def is_over(inbox: EpochInbox, epoch: int) -> bool:
    try:
        inbox.check(epoch)
    except StepAborted:
        return True
    return False


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


class SlowToJoin(Coordinator):
    """Gives a seat only after its taker has been stopped."""

    def __init__(self) -> None:
        super().__init__(GangShape(1, 0), ADDRESS)
        self.joining, self.given_up = threading.Event(), threading.Event()

    def join(
        self,
        holder_id: str,
        role: Role,
        address: Address,
        index: int | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> Seat | None:
        self.joining.set()
        assert self.given_up.wait(10)
        return super().join(holder_id, role, address, index, loading, spec, held)

    def leave(self, holder_id: str, reason: str) -> None:
        super().leave(holder_id, reason)
        self.given_up.set()


def test_a_seat_that_is_taken_while_the_watch_is_stopped_is_given_up_again(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    coordinator = SlowToJoin()
    watch, _ = start(lambda: coordinator)
    assert coordinator.joining.wait(10)
    watch.stop("the test is over")
    assert coordinator.join("successor", "attention", ADDRESS) is not None


def test_who_retires_goes_once_its_loop_is_out_of_the_epoch(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    coordinator = Coordinator(GangShape(1, 0), ADDRESS)
    watch, inbox = start(lambda: coordinator)
    epoch = next_epoch(inbox)
    retiring = threading.Thread(target=watch.retire, args=(20,))
    retiring.start()
    wait_until(lambda: inbox.is_changing(epoch), "its leader is not told to end the epoch")
    watch.left(epoch - 1, "an older one")
    assert retiring.is_alive()
    watch.left(epoch, "its membership changes")
    retiring.join(10)
    assert not retiring.is_alive()
    assert not coordinator.status().ready, "it is the only one"


def test_who_retires_does_not_wait_for_a_coordinator_that_is_gone() -> None:
    coordinator = Coordinator(GangShape(1, 0), ADDRESS)
    watch = SeatWatch(lambda: coordinator, Candidate("attention", ADDRESS), EpochInbox(), lambda: None)
    begin = time.monotonic()
    watch.retire(20)  # never joined
    assert time.monotonic() - begin < 10


class Mortal(Coordinator):
    """Cannot be reached once it has died."""

    died = False

    def poll(self, holder_id: str, wait_s: float, stats: Stats | None = None) -> Directive:
        if self.died:
            raise CoordinatorLost("it has died")
        return super().poll(holder_id, wait_s, stats)

    def left(self, holder_id: str, epoch: int, reason: str, suspect: str | None = None) -> None:
        if self.died:
            raise CoordinatorLost("it has died")
        super().left(holder_id, epoch, reason, suspect)


def test_a_worker_keeps_the_seat_whose_weights_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through coordinators that know nothing of their predecessors; and it says so when somebody else has the seat."""
    monkeypatch.setattr(watch_module, "_RETRY_S", 0.02)
    monkeypatch.setattr(watch_module, "_POLL_S", 0.05)
    monkeypatch.setattr(watch_module, "_GIVE_UP_S", 0.3)
    coordinators = [Mortal(GangShape(2, 2, colocated=True), ADDRESS, first_epoch=number) for number in (10, 20, 30)]
    coordinators[0].join("other", "attention", ADDRESS)
    coordinators[1].join("other", "attention", ADDRESS, index=0)
    coordinators[2].join("other", "attention", ADDRESS, index=1)
    asked: list[str] = []
    inbox, candidate = EpochInbox(), Candidate("attention", ADDRESS, loads_for_seat=True)
    watch = SeatWatch(lambda: next(c for c in coordinators if not c.died), candidate, inbox, lambda: asked.append("x"))
    watch.start()
    try:
        assert watch.wait_for_seat() == Seat("attention", 1)
        threading.Event().wait(0.2)
        assert inbox.take() is None, "no epoch without its weights"
        assert not asked, "nor statistics, since there is no engine yet"
        watch.loaded()
        assert next_epoch(inbox) == 10
        coordinators[0].died = True
        wait_until(lambda: is_over(inbox, 10), "nobody else knows of the epoch, and it goes on in it")
        watch.left(10, "told to")
        assert next_epoch(inbox) == 20, "in its own seat, not in the lowest free one, and loaded"
        assert not watch.displaced
        coordinators[1].died = True
        wait_until(lambda: watch.displaced, "somebody else has its seat for good, and it does not say so")
    finally:
        watch.stop("the test is over")


def test_an_epoch_goes_on_under_the_next_coordinator(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    """Between the two, and afterwards, nobody in it is told anything."""
    shape = GangShape(2, 0)
    former, latter = Mortal(shape, ADDRESS), Coordinator(shape, ADDRESS, first_epoch=100, gather_s=30.0)
    alive = threading.Event()

    def connect() -> Coordinator:
        if not former.died:
            return former
        if not alive.is_set():
            raise CoordinatorLost("none yet")
        return latter

    ranks = [start(connect) for _ in range(2)]
    for watch, inbox in ranks:
        assert next_epoch(inbox) == 1
        watch.serving(1)
    assert former.status().ready
    former.died = True
    threading.Event().wait(0.2)
    assert all(watch.seat is not None for watch, _ in ranks), "a seat is not lost with the coordinator"
    assert latter.join("another", "attention", ADDRESS) is None, "the seats may be taken"
    assert latter.status().gathering
    alive.set()
    wait_until(lambda: latter.status().ready, "the epoch is not adopted")
    assert (latter.status().epoch, latter.status().gathering) == (1, False)
    assert not any(is_over(inbox, 1) for _, inbox in ranks)
    watch, inbox = ranks[0]
    watch.left(1, "a step was aborted")
    wait_until(lambda: is_over(ranks[1][1], 1), "the other is not told")
    ranks[1][0].left(1, "told to")
    assert next_epoch(inbox) == 100, "above every epoch of the former coordinator"


def test_a_report_that_falls_between_two_coordinators_is_made_up_for(
    start: Callable[[Callable[[], Coordinator]], tuple[SeatWatch, EpochInbox]],
) -> None:
    shape = GangShape(2, 0)
    former, latter = Mortal(shape, ADDRESS), Coordinator(shape, ADDRESS, first_epoch=100, gather_s=30.0)
    alive = threading.Event()

    def connect() -> Coordinator:
        if former.died and not alive.is_set():
            raise CoordinatorLost("none yet")
        return latter if former.died else former

    ranks = [start(connect) for _ in range(2)]
    for _, inbox in ranks:
        assert next_epoch(inbox) == 1
    former.died = True
    ranks[0][0].left(1, "a step was aborted")  # to whom?
    alive.set()
    wait_until(lambda: is_over(ranks[1][1], 1), "the other goes on in an epoch that lacks a member")
    ranks[1][0].left(1, "told to")
    assert [next_epoch(inbox) for _, inbox in ranks] == [100, 100]


def test_an_owner_takes_over_a_gang_that_its_predecessor_was_about_to_end() -> None:
    coordinator = Coordinator(GangShape(1, 0), ADDRESS, spec="one")
    assert coordinator.own("a", "one")
    coordinator.drain(10.0)
    assert coordinator.status().reason == "the server is shutting down"
    keeping = threading.Thread(target=lambda: kept.append(coordinator.keep("a", 60.0)))
    kept: list[bool] = []
    keeping.start()
    assert not coordinator.own("b", "another"), "a gang of another spec is not adopted"
    assert coordinator.own("b", "one")
    keeping.join(10)
    assert kept == [False], "the former owner hears of it at once"
    assert "missing attention:0" in coordinator.status().reason
