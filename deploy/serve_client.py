"""The gang as an ingress replica reaches it: streaming calls to attention workers, status from the coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from divisi.cluster.errors import DivisiError, GangNotReady, Overloaded
from divisi.cluster.gang.coordinator import CoordinatorLost, CoordinatorStatus
from divisi.cluster.ray.coordinator import find_coordinator
from divisi.cluster.request import Request, TokenEvent
from divisi.deploy.api.engine_client import GangStatus
from divisi.deploy.stat_rows import stat_rows

_FRESH_S = 0.5


class ServeEngineClient:
    """Implements `divisi.deploy.api.engine_client.EngineClient`."""

    def __init__(
        self, workers: DeploymentHandle[Any], coordinator: str, max_unfinished: int, retry_after_s: float
    ) -> None:
        """`max_unfinished` requests are let in at once by this ingress replica."""
        self._generate = workers.options(method_name="generate", stream=True)
        self._name = coordinator
        self._coordinator: ActorHandle[Any] | None = None
        self._max_unfinished = max_unfinished
        self._retry_after_s = retry_after_s
        self._unfinished = 0
        self._status = GangStatus(False, "starting")
        self._checked_at = -math.inf
        self._checking = asyncio.Lock()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """See EngineClient."""
        if self._unfinished >= self._max_unfinished:
            raise Overloaded(f"{self._unfinished} requests are being served or queued", self._retry_after_s)
        # Counted before the first await: a burst must not slip past the limit while its status is being asked for.
        self._unfinished += 1
        try:
            await self._check_ready()
            async with contextlib.aclosing(self._stream(request)) as events:
                async for event in events:
                    yield event
        finally:
            self._unfinished -= 1

    async def status(self) -> GangStatus:
        """See EngineClient."""
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
        self._checked_at = time.monotonic()
        return self._status

    async def _check_ready(self) -> None:
        """One question serves a whole burst of requests; while the gang serves, its answer is good for a moment."""
        async with self._checking:
            if time.monotonic() - self._checked_at > _FRESH_S:
                await self.status()
        if not self._status.ready:
            raise GangNotReady(self._status.reason)

    async def _stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        response: Any = self._generate.remote(request)
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
