"""An attention worker's life: epoch after epoch, one step after another in lockstep with the gang, pass by pass.

The engine lives in the loop's thread; other threads reach it by `submit` and `cancel`, which are carried out between
two steps. A step that is aborted keeps its plan, which is run again in the next epoch; one that aborts again and again
inside a layer may be what ranks die of, and is taken apart by the engine.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import torch

from divisi.cluster.dispatch.protocol import DispatchMode, WorkerEnd
from divisi.cluster.door import Credentials
from divisi.cluster.errors import GangNotReady, RequestRejected, StepAborted
from divisi.cluster.gang.control.agreement import NOTHING, own_index
from divisi.cluster.gang.control.header import Header
from divisi.cluster.gang.control.links import worker_links
from divisi.cluster.gang.control.mesh import FollowerMesh, LeaderMesh
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.gang.loops.observer import NobodyObserves, WorkerObserver
from divisi.cluster.gang.loops.reports import EpochReports, level_of
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.passes import Pass, PassKind, PassLayers, plain_elsewhere
from divisi.cluster.request import Request, TokenEvent
from divisi.model.dispatcher import Dispatcher
from divisi.model.inference import in_inference_mode

log = logging.getLogger(__name__)


class Plan(Protocol):
    """What an engine wants to run next."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each of its passes, drafts first and the full pass last; at least one row."""
        ...

    @property
    def alone(self) -> bool:
        """Whether it is to have a step of the gang for itself."""
        ...

    @property
    def second(self) -> int:
        """Rows of the full pass that make up its second micro-batch; 0: it has one."""
        ...


PlanT = TypeVar("PlanT", bound=Plan)
AnswerT = TypeVar("AnswerT")


class StepEngine(Protocol[PlanT]):
    """The engine as the loop sees it; see `divisi.cluster.engine.engine.Engine`."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestRejected."""
        ...

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is there."""
        ...

    def plan(self) -> PlanT | None:
        """The next step, frozen until it has run; None with nothing to do."""
        ...

    def resize(self, max_rows: int, *, crowded: bool) -> bool:
        """Plan with so many rows from now on; whether the plan under way was larger, and is no more.

        `crowded`: ranks share cores, and have no time of their own in which another one computes.
        """
        ...

    def strike(self) -> bool:
        """The step under way has lost a rank inside a layer; whether its plan is no more, and another comes next."""
        ...

    def run_pass(self, plan: PlanT, index: int, dispatcher: Dispatcher) -> None:
        """Run one of the plan's passes, those before it having run. Raises StepAborted; then the first comes next."""
        ...

    def commit(self, plan: PlanT) -> Sequence[TokenEvent]:
        """Make a step final whose passes have all run."""
        ...

    def take_events(self) -> Sequence[TokenEvent]:
        """Events that no step caused."""
        ...

    def beside(self, sequences: int) -> None:
        """So many sequences of other workers decode without drafts in the step that begins."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerNetwork:
    """How a worker reaches its gang."""

    listener: socket.socket
    """Where the others connect if this worker leads."""
    device: torch.device
    step_deadline_s: float
    layers: PassLayers
    cores: CoreShare
    step_share: Callable[[int], int]
    """Rows that a worker may bring to a step, by the number of workers in the epoch."""
    credentials: Credentials
    """For the meeting of an epoch's ranks."""


@dataclass(frozen=True, slots=True)
class _Command(Generic[AnswerT]):
    """Something to do with the engine, and who waits for it."""

    question: Callable[[], AnswerT]
    answer: Future[AnswerT]

    def carry_out(self) -> None:
        """Anything but a rejection leaves the engine in an unknown state, and is raised here too."""
        # A client may have left while a long step kept its request waiting; a cancelled future takes no result.
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.question())
        except RequestRejected as error:
            self.answer.set_exception(error)
        except BaseException as error:
            self.answer.set_exception(error)
            raise

    def refuse(self, error: Exception) -> None:
        """Tell who waits that it will not happen."""
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)


class WorkerLoop(Generic[PlanT]):
    """Runs an engine in the thread that calls `run`, until the inbox is stopped."""

    def __init__(
        self,
        engine: StepEngine[PlanT],
        mode: DispatchMode,
        inbox: EpochInbox,
        reports: EpochReports,
        network: WorkerNetwork,
        deliver: Callable[[Sequence[TokenEvent]], None],
        observer: WorkerObserver[PlanT] | None = None,
    ) -> None:
        """`mode` carries the engine's rows; `deliver` gets a step's events, in the loop's thread."""
        self._engine = engine
        self._mode = mode
        self._inbox = inbox
        self._reports = reports
        self._network = network
        self._deliver = deliver
        self._observer = observer or NobodyObserves()
        self._commands: deque[_Command[Any]] = deque()
        self._ended = False
        self._plan: PlanT | None = None
        self._at: tuple[int, Sequence[Pass]] | None = None
        """Which pass of a step is under way."""

    def submit(self, request: Request) -> Future[None]:
        """Hand a request to the engine, from any thread. The future may carry RequestRejected."""
        arrived = perf_counter()

        def submit() -> None:
            self._engine.submit(request)
            self._observer.submitted(request, arrived)

        return self.ask(submit)

    def cancel(self, request_id: str) -> None:
        """Drop a request, from any thread."""
        self.ask(lambda: self._engine.cancel(request_id))

    def ask(self, question: Callable[[], AnswerT]) -> Future[AnswerT]:
        """Have something done with the engine in its own thread, between two steps; skipped if cancelled before.

        The future carries GangNotReady when the loop has ended.
        """
        answer: Future[AnswerT] = Future()
        self._commands.append(_Command(question, answer))
        self._inbox.wake.set()
        if self._ended:
            self._refuse_commands()
        return answer

    def run(self) -> None:
        """Enter the epochs that the inbox offers; requests are accepted and cancelled in between, too."""
        try:
            self._enter_epochs()
        finally:
            self._ended = True
            self._refuse_commands()

    def _enter_epochs(self) -> None:
        while not self._inbox.stopping:
            assignment = self._inbox.take()
            if assignment is None:
                self._carry_out_commands()
                self._inbox.wait()
                continue
            try:
                self._serve(assignment)
            except StepAborted as error:
                # Its text only: whoever keeps the error keeps the epoch's transfers, and the peers' connections open.
                epoch, reason = assignment.membership.epoch, str(error)
                log.log(level_of(error), "left epoch %d%s: %s", epoch, self._place(), reason)
                self._observer.aborted(reason)
                self._reports.left(epoch, reason, error.seat)

    def _serve(self, assignment: Assignment) -> None:
        """One epoch; ends by StepAborted."""
        self._at = None
        self._inbox.check(assignment.membership.epoch)
        spin_s = self._network.cores.take(assignment)
        share = self._network.step_share(len(assignment.membership.workers))
        if self._engine.resize(share, crowded=not spin_s):
            self._plan = None
        network, mark = self._network, self._observer.mark
        listener, device, credentials = network.listener, network.device, network.credentials
        with worker_links(assignment, self._inbox, listener, device, credentials, spin_s, mark) as links:
            end = self._mode.worker_end(links.peers)
            self._reports.serving(assignment.membership.epoch)
            while True:
                self._step(links.mesh, links.peers.seat, end)

    @in_inference_mode
    def _step(self, mesh: LeaderMesh | FollowerMesh, seat: int, end: WorkerEnd) -> None:
        """Take part in one step of the gang, or wait for something to do."""
        self._carry_out_commands()
        if self._plan is None:
            self._plan = self._engine.plan()
            self._deliver_events()
        if self._plan is None:
            mesh.announce(NOTHING)
        else:
            mesh.announce(self._plan.counts, self._plan.alone, self._plan.second)
        self._at = None
        header = mesh.next_step(self._network.step_deadline_s)
        if header is None:
            return
        # Rows that were announced while the header was on its way are not in it.
        plan = self._plan if header.includes(seat) else None
        self._engine.beside(plain_elsewhere(header.passes, seat))
        self._observer.began(header, plan)
        try:
            self._walk(header, seat, plan, end)
        except StepAborted:
            if plan is not None and self._engine.strike():
                self._plan = None
            raise
        if plan is None or not end.carried_all():  # what was not carried is planned still, and runs again
            self._observer.ended(None)
            return
        events = self._engine.commit(plan)
        self._plan = None
        self._observer.ended(plan)
        if events:
            self._tell(events)

    def _walk(self, header: Header, seat: int, plan: PlanT | None, end: WorkerEnd) -> None:
        """All passes of a step: this worker's own, and its part in those to which it brings no rows."""
        marked = bool(header.trace)
        for index, step_pass in enumerate(header.passes):
            self._at = index, header.passes
            if marked:
                self._observer.pass_began(step_pass, step_pass.rows(seat))
            end.begin(step_pass)
            if plan is not None and step_pass.rows(seat):
                own = own_index(step_pass, index, plan.counts)
                second = plan.second if step_pass.kind is PassKind.FULL else 0
                counted = step_pass.rows(seat), step_pass.second.get(seat, 0)
                if not 0 <= own < len(plan.counts) or counted != (plan.counts[own], second):
                    raise StepAborted("the header counts other rows than were announced")
                self._engine.run_pass(plan, own, end)
            else:
                self._idle(self._network.layers.of(step_pass.kind), end)
            if marked:
                self._observer.pass_ended()

    def _place(self) -> str:
        """For the log: where in a step it is."""
        if self._at is None:
            return ""
        index, passes = self._at
        return f" in pass {index + 1} of {len(passes)} ({passes[index].kind.name.lower()})"

    @in_inference_mode
    def _idle(self, layers: Sequence[int], end: WorkerEnd) -> None:
        for layer in layers:
            end.idle(layer)

    def _refuse_commands(self) -> None:
        """Nobody carries them out any more, and nobody shall wait for that. From any thread."""
        with contextlib.suppress(IndexError):
            while True:
                self._commands.popleft().refuse(GangNotReady("this attention worker has stopped"))

    def _carry_out_commands(self) -> None:
        while self._commands:
            self._commands.popleft().carry_out()
        self._deliver_events()

    def _deliver_events(self) -> None:
        if events := self._engine.take_events():
            self._tell(events)

    def _tell(self, events: Sequence[TokenEvent]) -> None:
        self._observer.told(events)
        self._deliver(events)
