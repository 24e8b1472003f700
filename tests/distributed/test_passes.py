"""Steps of several passes: real loops, meshes and groups, engines that bring given rows, and a fault in any pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.broadcast import Broadcast
from divisi.cluster.dispatch.colocated import Colocated
from divisi.cluster.dispatch.local import Local
from divisi.cluster.dispatch.protocol import DispatchMode, Experts, Peers, ShardEnd, WorkerEnd
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.dispatch.wire import Transport, WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.peer import listen
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.gang.loops.shard_loop import ShardLoop
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.gang.loops.worker_loop import WorkerLoop, WorkerNetwork
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.watch import Candidate, SeatWatch
from divisi.cluster.passes import Pass, PassKind, PassLayers
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.seats import Address, GangShape, Seat
from divisi.model.dispatcher import Dispatcher, Pending
from divisi.model.placement import deal
from tests.support.credentials import CREDENTIALS
from tests.support.gangs import CPU, DenseExperts

HOST, WIDTH, CHOSEN, EXPERTS = "127.0.0.1", 16, 2, 5
LAYERS = PassLayers(full=(0, 1, 2), draft=(3,))
COUNTS = ((2, 1, 5), (3,))
MERGED = [
    Pass(PassKind.DRAFT, {0: 2}),
    Pass(PassKind.DRAFT, {0: 1}),
    Pass(PassKind.FULL, {0: 5, 1: 3}),
]
TRANSPORT = Transport(WireFormat(WIDTH, CHOSEN, torch.float32, EXPERTS), 8, 10.0, CPU, torch.float32)
WEIGHTS = torch.randn(4, EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5
SPLIT, COLOCATED, LOCAL = GangShape(2, 2), GangShape(2, 2, colocated=True), GangShape(2, 0)


def name_of(shape: GangShape) -> str:
    return "colocated" if shape.colocated else "split" if shape.expert_shards else "local"


@dataclass
class Fault:
    """Aborts, once, in the first layer of a pass at one seat."""

    seat: Seat
    at: int
    open: bool = True

    def strike(self, seat: Seat, at: int) -> None:
        if self.open and (seat, at) == (self.seat, self.at):
            self.open = False
            raise StepAborted("planted", str(seat))


class Log:
    """What the ends of a rank were told, epoch by epoch: the passes that began, with the layers they went through."""

    def __init__(self) -> None:
        self.epochs: list[list[tuple[Pass, list[int]]]] = []

    def walked(self) -> list[tuple[Pass, list[int]]]:
        """In the last epoch."""
        return self.epochs[-1]


class WatchedEnd:
    """Either end of a mode, that tells a log and fails where it is told to."""

    def __init__(self, end: WorkerEnd | ShardEnd, seat: Seat, log: Log, fault: Fault | None) -> None:
        self._end, self._seat, self._log, self._fault = end, seat, log, fault
        log.epochs.append([])

    def begin(self, step_pass: Pass) -> None:
        self._log.walked().append((step_pass, []))
        self._end.begin(step_pass)

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Pending:
        self._enter(layer)
        return self._end.dispatch(layer, x_TD, expert_ids_TK, gates_TK)  # type: ignore[union-attr]

    def idle(self, layer: int) -> None:
        self._enter(layer)
        self._end.idle(layer)  # type: ignore[union-attr]

    def carried_all(self) -> bool:
        return self._end.carried_all()  # type: ignore[union-attr]

    def serve(self, layer: int) -> None:
        self._enter(layer)
        self._end.serve(layer)  # type: ignore[union-attr]

    def _enter(self, layer: int) -> None:
        self._log.walked()[-1][1].append(layer)
        if self._fault is not None:
            self._fault.strike(self._seat, len(self._log.walked()) - 1)


@dataclass(frozen=True)
class Watched:
    """A mode of watched ends."""

    mode: DispatchMode
    log: Log
    fault: Fault | None

    def worker_end(self, peers: Peers) -> WorkerEnd:
        return WatchedEnd(self.mode.worker_end(peers), Seat("attention", peers.seat), self.log, self.fault)

    def shard_end(self, peers: Peers, experts: Experts) -> ShardEnd:
        assert isinstance(self.mode, Broadcast)
        return WatchedEnd(self.mode.shard_end(peers, experts), Seat("expert", peers.seat), self.log, self.fault)


@dataclass(frozen=True)
class CountedPlan:
    counts: tuple[int, ...]
    alone: bool = False
    second: int = 0


@dataclass
class CountedEngine:
    """Has one step to run, of given counts; checks every sum against the dense reference."""

    plans: list[CountedPlan] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    commits: int = 0
    plain_elsewhere: int = -1
    """As it was told last."""

    def submit(self, request: Request) -> None:
        raise AssertionError

    def cancel(self, request_id: str) -> None:
        raise AssertionError

    def beside(self, sequences: int) -> None:
        self.plain_elsewhere = sequences

    def take_events(self) -> Sequence[TokenEvent]:
        return ()

    def plan(self) -> CountedPlan | None:
        return self.plans.pop() if self.plans else None

    def resize(self, max_rows: int, *, crowded: bool) -> bool:
        return False

    def strike(self) -> bool:
        return False

    def run_pass(self, plan: CountedPlan, index: int, dispatcher: Dispatcher) -> None:
        self.ran.append(index)
        full = index == len(plan.counts) - 1
        rows, rng = plan.counts[index], torch.Generator().manual_seed(10 * len(plan.counts) + index)
        everything = DenseExperts(WEIGHTS, deal(EXPERTS, 1)[0])
        for layer in LAYERS.full if full else LAYERS.draft:
            x_TD = torch.randn(rows, WIDTH, generator=rng)
            ids_TK = torch.rand(rows, EXPERTS, generator=rng).argsort(dim=1)[:, :CHOSEN].to(torch.int32).contiguous()
            gates_TK = torch.rand(rows, CHOSEN, generator=rng)
            y_TD = dispatcher.dispatch(layer, x_TD, ids_TK, gates_TK).combine()
            want_TD = everything.partial_sum(layer, x_TD, ids_TK, gates_TK)
            torch.testing.assert_close(y_TD, want_TD, atol=1e-5, rtol=1e-5)

    def commit(self, plan: CountedPlan) -> Sequence[TokenEvent]:
        self.commits += 1
        return (TokenEvent(f"{plan.counts}", (1,), None),)


class Rank:
    """A loop in a thread that holds a seat."""

    def __init__(self, coordinator: Coordinator, candidate: Candidate) -> None:
        self.inbox = EpochInbox()
        self.watch = SeatWatch(lambda: coordinator, candidate, self.inbox, lambda: None)
        self.log = Log()
        self.error: BaseException | None = None

    def start(self, run: Callable[[], None]) -> None:
        def noting() -> None:
            try:
                run()
            except AssertionError as error:  # of the engine's
                self.error = error

        self._thread = threading.Thread(target=noting)
        self._thread.start()
        self.watch.start()

    def close(self) -> None:
        self.inbox.stop()
        self._thread.join(20)
        self.watch.stop("the test is over")
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class Gang:
    engines: list[CountedEngine]
    workers: list[Rank]
    shards: list[Rank]
    committed: threading.Semaphore


@contextlib.contextmanager
def counted_gang(shape: GangShape, fault: Fault | None) -> Iterator[Gang]:
    """Two workers whose engines have the plans of COUNTS, and their shards."""
    store = StoreServer(HOST, CREDENTIALS)  # serves for as long as it is referred to
    coordinator = Coordinator(shape, store.address, virtual_shards=EXPERTS)
    shares = deal(EXPERTS, max(shape.expert_shards, 1))
    gang = Gang([], [], [], threading.Semaphore(0))
    with contextlib.ExitStack() as stack:
        for index, counts in enumerate(COUNTS):
            listener = stack.enter_context(contextlib.closing(listen(HOST)))
            address = Address(HOST, listener.getsockname()[1])
            rank, engine = (
                Rank(coordinator, Candidate("attention", address, index)),
                CountedEngine([CountedPlan(counts)]),
            )
            mode = Watched(worker_mode(shape, index), rank.log, fault)
            network = WorkerNetwork(listener, CPU, 10.0, LAYERS, CoreShare(1), lambda workers: 8, CREDENTIALS)
            loop = WorkerLoop(engine, mode, rank.inbox, rank.watch, network, lambda events: gang.committed.release())
            rank.start(loop.run)
            stack.callback(rank.close)
            gang.engines.append(engine)
            gang.workers.append(rank)
        for index in range(len(shape.shard_ranks)):
            rank = Rank(coordinator, Candidate("expert", Address(HOST), index))
            mode, experts = Watched(Broadcast(TRANSPORT), rank.log, fault), DenseExperts(WEIGHTS, shares[index])
            rank.start(ShardLoop(experts, mode, LAYERS, CPU, CoreShare(1), CREDENTIALS, rank.inbox, rank.watch).run)
            stack.callback(rank.close)
            gang.shards.append(rank)
        yield gang


def worker_mode(shape: GangShape, index: int) -> DispatchMode:
    if not shape.expert_shards:
        return Local(DenseExperts(WEIGHTS, deal(EXPERTS, 1)[0]))
    if shape.colocated:
        return Colocated(TRANSPORT, DenseExperts(WEIGHTS, deal(EXPERTS, shape.expert_shards)[index]))
    return Broadcast(TRANSPORT)


def check_step(shape: GangShape, fault: Fault | None) -> None:
    """Both plans run and are committed once; in the last epoch every rank walks all passes, its part in each."""
    with counted_gang(shape, fault) as gang:
        for _ in COUNTS:
            assert gang.committed.acquire(timeout=20), [rank.error for rank in gang.workers]
    assert [engine.commits for engine in gang.engines] == [1, 1]
    # Of the other's five rows three are drafts, and the two that draft are not plain; of its three none is.
    assert [engine.plain_elsewhere for engine in gang.engines] == [3, 0]
    assert gang.engines[0].ran[-3:] == [0, 1, 2]
    assert gang.engines[1].ran[-1:] == [0]
    everything = [(step_pass, list(LAYERS.of(step_pass.kind))) for step_pass in MERGED]
    for rank in (*gang.workers, *gang.shards):
        assert rank.log.walked() == everything
        assert len(rank.log.epochs) == (1 if fault is None else 2)
    if fault is not None:
        assert not fault.open
        first = gang.engines[0].ran[:-3]
        assert first == list(range(len(first))), "a replay starts again at the first pass"


@pytest.mark.parametrize("shape", [SPLIT, COLOCATED, LOCAL], ids=name_of)
def test_two_workers_walk_three_passes(shape: GangShape) -> None:
    check_step(shape, None)


FAULTS = [
    (shape, seat, at)
    for shape in (SPLIT, COLOCATED)
    for seat in (Seat("attention", 0), Seat("attention", 1), Seat("expert", 1))
    for at in range(len(MERGED))
    if seat in shape.seats
]


@pytest.mark.parametrize(
    ("shape", "seat", "at"), FAULTS, ids=lambda v: name_of(v) if isinstance(v, GangShape) else str(v)
)
def test_an_abort_in_any_pass_runs_all_of_them_again(
    shape: GangShape, seat: Seat, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    check_step(shape, Fault(seat, at))
    records = [record for record in caplog.records if record.message.startswith("left epoch 1")]
    assert len(records) == shape.size
    kind = "full" if at == len(MERGED) - 1 else "draft"
    assert any(f" in pass {at + 1} of {len(MERGED)} ({kind}): " in record.message for record in records)
    # Who kept an error would keep its traceback, the transfers in it, and with them the peers' connections open.
    left = [record.args for record in records]
    assert all(isinstance(args, tuple) and not any(isinstance(arg, Exception) for arg in args) for args in left)
