"""The gang as an ingress replica reaches it: streaming calls to attention workers, status from the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from divisi.cluster.errors import DivisiError, GangNotReady
from divisi.cluster.gang.coordinator import CoordinatorLost, CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.api.engine_client import GangStatus
from divisi.deploy.limits import Gate
from divisi.deploy.stat_rows import stat_rows

_FRESH_S = 0.5
_STATUS_TIMEOUT_S = 10.0
_REPORT_EVERY_S = 0.5
_RESEND_S = 3.0
"""While the gang serves, a request that a worker refuses goes to another: within this the router knows which."""
_RESEND_EVERY_S = 0.1


class ServeEngineClient:
    """Implements `divisi.deploy.api.engine_client.EngineClient`."""

    def __init__(
        self, workers: DeploymentHandle[Any], coordinator: str, gate: Gate, ingress_id: str = "ingress"
    ) -> None:
        """`gate` is this ingress replica's: what is inside is reported, and ends when the gang is about to end."""
        self._generate = workers.options(method_name="generate", stream=True)
        self._name = coordinator
        self._coordinator: ActorHandle[Any] | None = None
        self._gate = gate
        self._ingress_id = ingress_id
        self._reporting: asyncio.Task[None] | None = None
        self._status = GangStatus(False, "starting")
        self._checked_at = -math.inf
        self._checking = asyncio.Lock()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """See EngineClient."""
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.create_task(self._report_open())
        give_up_at = time.monotonic() + _RESEND_S
        while True:
            await self.check_ready()
            try:
                async with contextlib.aclosing(self._stream(request)) as events:
                    async for event in events:
                        yield event
                return
            except GangNotReady:  # this worker's word only, before any event
                if time.monotonic() > give_up_at:
                    raise
            await asyncio.sleep(_RESEND_EVERY_S)

    async def status(self) -> GangStatus:
        """See EngineClient."""
        asked_at = time.monotonic()
        try:
            if self._coordinator is None:
                self._coordinator = await asyncio.to_thread(find_coordinator, self._name)
            found: CoordinatorStatus = await self._coordinator.status.remote()
        except (CoordinatorLost, RayError) as error:
            self._coordinator = None
            reason = str(error) if isinstance(error, CoordinatorLost) else "the coordinator has stopped"
            self._status = GangStatus(False, reason)
        else:
            failures = [f"{who} could not load: {text}" for who, text in sorted(found.failures.items())]
            self._status = GangStatus(found.ready, "; ".join([found.reason, *failures]), stat_rows(found.stats))
        self._checked_at = asked_at
        return self._status

    async def _report_open(self) -> None:
        """Report now and then while anything is open, and once more at its end; the answer says when it has to end."""
        while self._gate.busy.is_set():
            await self._report_once()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gate.idle.wait(), _REPORT_EVERY_S)
        await self._report_once()

    async def _report_once(self) -> None:
        if self._coordinator is None:
            return  # the next status looks for it
        try:
            left_s: float | None = await self._coordinator.report_open.remote(self._ingress_id, self._gate.answers)
        except RayError:
            return  # gone, or being replaced: the requests themselves will show it
        if left_s is not None:
            self._gate.end_all_in(left_s)

    async def check_ready(self) -> None:
        """See EngineClient. One question serves a whole burst; while the gang serves, its answer is good for a moment.

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
                    raise GangNotReady("the coordinator does not answer") from None
        if not self._status.ready:
            raise GangNotReady(self._status.reason)

    async def _stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        # In a context of its own: Serve gives all calls of one HTTP request (several prompts, n > 1) the same internal
        # id, and a router that tells calls apart by it would leave all but one of them waiting for ever.
        response: Any = contextvars.Context().run(self._generate.remote, request)
        finished = False
        try:
            async for item in response:
                if isinstance(item, DivisiError):
                    finished = True
                    raise item
                for event in item:
                    finished = event.finish_reason is not None
                    yield event
        except (RayError, RayServeException) as error:  # the worker's process died with the request in it
            finished = True
            text = f"the attention worker was lost: {type(error).__name__}"
            yield TokenEvent(request.request_id, (), None, finish_reason="error", error=text)
        finally:
            if not finished:
                response.cancel()
