"""The gang as an ingress replica reaches it: streams over connections to the workers, status from the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextvars import Context
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from divisi.cluster.errors import AnswerLost, GangNotReady, WorkerLeft, WorkerLost
from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.ray.secret import gang_secret
from divisi.cluster.request import Request, TokenEvent
from divisi.cluster.spec import GangSpec
from divisi.cluster.streams.client import WorkerConnection
from divisi.cluster.streams.workers import WorkerConnections
from divisi.cluster.telemetry.context import current_traceparent
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.rows import stat_rows
from divisi.deploy.api.engine_client import GangStatus
from divisi.deploy.application.journal import Journal
from divisi.deploy.application.moved_answers import MovedAnswers
from divisi.deploy.limits import Gate, GateLimits
from divisi.deploy.routing import QueuedTokens, WorkerReport

_FRESH_S = 0.5
_STATUS_TIMEOUT_S = 2.0
_REPORT_EVERY_S = 0.5
_CONNECT_S = 1.0
"""A worker whose address has just become known takes a few milliseconds to be reached."""
_RESEND_S = 3.0
"""While the gang serves, a request that a worker refuses goes to another: by then its report says that it does."""
_RESEND_EVERY_S = 0.1
_RECOVERY_S = 5.0
"""A request that comes while the gang forms anew waits so long; then it is refused."""
_RESUME_S = 600.0
"""An answer that a lost worker has begun waits so long for another one, which may have weights to load."""


class ServeEngineClient:
    """Implements `divisi.deploy.api.engine_client.EngineClient`."""

    def __init__(
        self,
        spec: GangSpec,
        gate: Gate,
        ingress_id: str = "ingress",
        ingress_replicas: int = 1,
        telemetry: Telemetry | None = None,
        limits_of: Callable[[int], GateLimits] | None = None,
    ) -> None:
        """`gate` is this ingress replica's: what is inside is reported, and ends when the gang is about to end.

        `limits_of` gives its limits by the number of attention workers in the epoch; None: they stay as they are.
        """
        self._spec = spec
        self._coordinator: ActorHandle[Any] | None = None
        self._connections = WorkerConnections(ray.util.get_node_ip_address(), gang_secret(spec), spec.tls)
        self._queues: QueuedTokens[WorkerConnection] = QueuedTokens(alone=ingress_replicas == 1)
        self._gate = gate
        self._limits_of = limits_of
        self._ingress_id = ingress_id
        self._moves = MovedAnswers(telemetry)
        self._reporting: asyncio.Task[None] | None = None
        self._status = GangStatus(False, "starting")
        self._recovering = False
        """Whether the gang has served, and is about to serve again."""
        self._checked_at = -math.inf
        self._checking = asyncio.Lock()
        self._workers = 0
        """Of the last epoch that was heard of."""

    async def generate(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """See EngineClient."""
        if self._reporting is None or self._reporting.done():
            # Of no request: what it asks is no part of the trace of the one that happened to start it.
            self._reporting = asyncio.create_task(self._report_open(), context=Context())
        now = time.monotonic()
        journal, give_up_at = Journal(replace(request, arrived=now)), now + _RESEND_S
        while True:
            if not journal.resumed:
                await self.check_ready()
            try:
                async with contextlib.aclosing(self._stream(journal.attempt())) as batches:
                    async for events in batches:
                        if fresh := journal.take(events):
                            yield fresh
                return
            except GangNotReady:  # this worker's word only, before any event
                if time.monotonic() > give_up_at:
                    raise
                self._moves.resent()
                await asyncio.sleep(_RESEND_EVERY_S)
            except (WorkerLost, WorkerLeft) as error:
                self._moves.resumed(journal.interrupted(error))
                give_up_at = time.monotonic() + _RESUME_S
                await self._wait_for_a_worker(give_up_at)
                await asyncio.sleep(journal.stand_back_s)

    async def status(self) -> GangStatus:
        """See EngineClient."""
        asked_at = time.monotonic()
        try:
            if self._coordinator is None:
                self._coordinator = await asyncio.to_thread(find_coordinator, self._spec.name)
            found: CoordinatorStatus = await self._coordinator.status.remote(current_traceparent())
        except (CoordinatorLost, RayError) as error:
            self._coordinator = None
            reason = str(error) if isinstance(error, CoordinatorLost) else "the coordinator has stopped"
            self._status = self._without_coordinator(reason)
        else:
            if found.gathering:
                self._status = self._without_coordinator(found.reason)
                self._checked_at = asked_at
                return self._status
            self._recovering = found.recovering
            self._connections.name(found.streams)
            self._workers = found.workers or self._workers
            self.take_limits()
            failures = [f"{who} could not load: {text}" for who, text in sorted(found.failures.items())]
            ready, reasons = found.ready, [found.reason, *failures]
            if ready and not await self._connections.wait_until_able(_CONNECT_S):
                ready, reasons = False, ["no attention worker can be reached from this ingress", *failures]
            rows = stat_rows(found.stats, found.gang)
            self._status = GangStatus(ready, "; ".join(reasons), rows, found.targets)
        self._checked_at = asked_at
        return self._status

    async def scale(self, expert_shards: int) -> ScaleStatus:
        """See GangAdmin."""
        return await self._ask("scale", expert_shards)

    async def scale_status(self) -> ScaleStatus:
        """See GangAdmin."""
        return await self._ask("scale_status")

    async def _ask(self, method: str, *arguments: int) -> ScaleStatus:
        try:
            coordinator = self._coordinator or await asyncio.to_thread(find_coordinator, self._spec.name)
            status: ScaleStatus = await getattr(coordinator, method).remote(*arguments)
        except CoordinatorLost as error:
            raise GangNotReady(str(error)) from None
        except RayTaskError as error:
            raise error.cause from None
        except RayError:
            raise GangNotReady("the coordinator has stopped") from None
        return status

    def _without_coordinator(self, reason: str) -> GangStatus:
        """While it is replaced the gang goes on: as it was, where a worker says that it takes requests."""
        was = self._status
        return GangStatus(was.ready and bool(self._connections.able()), reason, was.stats, was.targets)

    def take_limits(self) -> None:
        """Have the gate go by the limits as they are now."""
        if self._limits_of is not None and self._workers:
            self._gate.limits = self._limits_of(self._workers)

    async def _wait_for_a_worker(self, give_up_at: float) -> None:
        """For an answer that has begun: whether the gang as a whole serves is not asked, as it will again."""
        while not self._connections.able():
            if time.monotonic() > give_up_at:
                raise AnswerLost(f"no attention worker could go on with the answer within {_RESUME_S:g} s")
            with contextlib.suppress(GangNotReady):
                await self._ask_whether_ready()  # which names the workers that there are now
            await self._connections.wait_until_able(_RESEND_EVERY_S)

    async def _report_open(self) -> None:
        """Report now and then while anything is open, and once more at its end; the answer says when it has to end."""
        while self._gate.busy.is_set():
            await self._report_once()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gate.idle.wait(), _REPORT_EVERY_S)
            if self._status.ready:  # a gate that is full asks nobody, and would not hear of a worker that has come
                with contextlib.suppress(GangNotReady):
                    await self._ask_whether_ready()
        await self._report_once()

    async def _report_once(self) -> None:
        if self._coordinator is None:
            return  # the next status looks for it
        try:
            left_s: float | None = await self._coordinator.report_open.remote(
                self._ingress_id, self._gate.answers, self._gate.refused_tokens
            )
        except RayError:
            return  # gone, or being replaced: the requests themselves will show it
        if left_s is not None:
            self._gate.end_all_in(left_s)

    async def check_ready(self) -> None:
        """See EngineClient. A new epoch of a gang that has served takes a moment, seldom more: it is waited for."""
        until = time.monotonic() + _RECOVERY_S
        while True:
            try:
                return await self._ask_whether_ready()
            except GangNotReady:
                if not self._recovering or time.monotonic() > until:
                    raise
            await asyncio.sleep(_RESEND_EVERY_S)

    async def _ask_whether_ready(self) -> None:
        """One question serves a whole burst; while the gang serves, its answer is good for a moment. Else GangNotReady.

        That it does not serve counts only for those who came before the question: another ingress replica may have
        told the client since that it does.
        """
        good_since = time.monotonic()
        async with self._checking:
            if self._status.ready:
                good_since = time.monotonic() - _FRESH_S
            if self._checked_at < good_since:
                try:
                    async with asyncio.timeout(_STATUS_TIMEOUT_S):
                        await self.status()
                except TimeoutError:
                    self._status = self._without_coordinator("the coordinator does not answer")
                    self._checked_at = time.monotonic()
        if not self._status.ready:
            raise GangNotReady(self._status.reason)

    async def _stream(self, request: Request) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """From one worker. Raises what it refuses by, before any event."""
        worker = self._choose(request)
        try:
            stream = worker.open(request)
            try:
                while True:
                    events = await stream.take()
                    yield events
                    if events[-1].finish_reason is not None:
                        return
            finally:
                worker.close(stream)
        finally:
            self._queues.finished(request.request_id)

    def _choose(self, request: Request) -> WorkerConnection:
        """Raises GangNotReady while no worker takes requests."""
        reports = {
            worker: WorkerReport(worker.reported_at, report.queued_tokens, report.unfinished, report.free_tokens)
            for worker, report in self._connections.able().items()
        }
        if not reports:
            raise GangNotReady("no attention worker takes requests now")
        tokens = len(request.prompt) + len(request.answered)
        return self._queues.choose(reports, request.request_id, tokens)
