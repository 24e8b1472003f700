"""A worker's loop from other threads: commands, their end, and epochs that are over before they began."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch

from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.protocol import Experts
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.engine.step.plan import StepPlan
from divisi.cluster.errors import GangNotReady, RequestRejected
from divisi.cluster.gang.control.peer import listen
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.gang.loops.shard_loop import ShardLoop
from divisi.cluster.gang.loops.worker_loop import WorkerLoop, WorkerNetwork
from divisi.cluster.passes import PassLayers
from divisi.cluster.request import Request, Sampling, TokenEvent
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.model.dispatcher import Dispatcher
from divisi.model.placement import Layout
from tests.support.credentials import CREDENTIALS

CPU = torch.device("cpu")
MODE = Broadcast(Transport(WireFormat(4, 1, torch.float32, 1), 8, 5.0, CPU, torch.float32))
LAYERS = PassLayers(full=(0,))


class IdleEngine:
    """Notes what it is told; refuses empty prompts; breaks on the prompt (13,)."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def submit(self, request: Request) -> None:
        if not request.prompt:
            raise RequestRejected("the prompt is empty")
        if request.prompt == (13,):
            raise ZeroDivisionError("engine bug")
        self.known.append(request.request_id)

    def cancel(self, request_id: str) -> None:
        if request_id in self.known:
            self.known.remove(request_id)

    def plan(self) -> StepPlan | None:
        return None

    def resize(self, max_rows: int, *, crowded: bool) -> bool:
        return False

    def strike(self) -> bool:
        raise AssertionError("it never plans")

    def run_pass(self, plan: StepPlan, index: int, dispatcher: Dispatcher) -> None:
        raise AssertionError("it never plans")

    def commit(self, plan: StepPlan) -> Sequence[TokenEvent]:
        raise AssertionError("it never plans")

    def beside(self, sequences: int) -> None:
        """Of no interest here."""

    def take_events(self) -> Sequence[TokenEvent]:
        return ()


class Reports:
    """What the loop tells the coordinator."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.changed = threading.Event()

    def serving(self, epoch: int) -> None:
        self.told.append(("serving", epoch))
        self.changed.set()

    def left(self, epoch: int, reason: str, suspect: str | None = None) -> None:
        self.told.append(("left", epoch))
        self.changed.set()


class Running:
    """A loop in a thread."""

    def __init__(self) -> None:
        self.engine, self.inbox, self.reports = IdleEngine(), EpochInbox(), Reports()
        self.listener = listen("127.0.0.1")
        network = WorkerNetwork(self.listener, CPU, 5.0, LAYERS, 1, lambda workers: 8, CREDENTIALS)
        self.loop = WorkerLoop[StepPlan](self.engine, MODE, self.inbox, self.reports, network, lambda events: None)
        self.ended_by: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except ZeroDivisionError as error:
            self.ended_by = error

    def close(self) -> None:
        self.inbox.stop()
        self.thread.join(10)
        self.listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def request(name: str, *prompt: int) -> Request:
    return Request(name, prompt, 4, Sampling())


def test_a_client_that_leaves_before_its_request_is_taken_harms_nobody(running: Running) -> None:
    go_on = threading.Event()
    held = running.loop.ask(lambda: go_on.wait(10))  # as a long step holds the loop
    waiting = running.loop.submit(request("a", 1))
    assert waiting.cancel()
    running.loop.cancel("a")
    go_on.set()
    assert held.result(10)
    running.loop.submit(request("b", 1)).result(10)
    assert running.engine.known == ["b"]


def test_a_rejection_reaches_who_asked_and_nobody_else(running: Running) -> None:
    with pytest.raises(RequestRejected, match="empty"):
        running.loop.submit(request("a")).result(10)
    running.loop.submit(request("b", 1)).result(10)


def test_nobody_waits_for_a_loop_that_has_ended(running: Running) -> None:
    go_on = threading.Event()
    running.loop.ask(lambda: go_on.wait(10))
    fatal = running.loop.submit(request("fatal", 13))
    behind = running.loop.submit(request("behind", 1))
    go_on.set()
    with pytest.raises(ZeroDivisionError):
        fatal.result(10)
    with pytest.raises(GangNotReady):
        behind.result(10)
    running.thread.join(10)
    assert isinstance(running.ended_by, ZeroDivisionError)
    with pytest.raises(GangNotReady):
        running.loop.submit(request("late", 1)).result(10)


def over_before_it_began(inbox: EpochInbox, reports: Reports) -> None:
    """Break an epoch between the watch's offer and the loop's taking it: the coordinator waits for the report."""
    address = Address("127.0.0.1", 1)
    membership = Membership(7, GangShape(1, 1), ("a", "b"), (address,) * 2, address)
    inbox.interrupt(7)
    inbox.offer(Assignment(membership, 0))
    assert reports.changed.wait(10)
    assert reports.told == [("left", 7)]


def test_a_worker_reports_to_have_left_an_epoch_that_was_over_before_it_began(running: Running) -> None:
    over_before_it_began(running.inbox, running.reports)


def test_a_shard_reports_to_have_left_an_epoch_that_was_over_before_it_began() -> None:
    class NoExperts:
        """Never asked."""

        num_leaves = 1

        def serving(self, layout: Layout, seat: int) -> Experts:
            raise AssertionError

    inbox, reports = EpochInbox(), Reports()
    loop = ShardLoop(NoExperts(), MODE, LAYERS, CPU, 1, CREDENTIALS, inbox, reports)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        over_before_it_began(inbox, reports)
    finally:
        inbox.stop()
        thread.join(10)
    assert not thread.is_alive()
