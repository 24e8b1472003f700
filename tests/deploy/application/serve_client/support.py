"""A coordinator that answers as it is told, and what is asked of an ingress's end of the gang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.request import EndReason, Request, Sampling, TokenEvent
from divisi.cluster.telemetry.process import Telemetry
from divisi.deploy.application.serve_client import ServeEngineClient
from tests.support.scripted_worker import ScriptedWorker, token


class Coordinator:
    """Stands for the handle of the coordinator's actor."""

    def __init__(self, **changes: Any) -> None:
        self.asked = 0
        self.answer = CoordinatorStatus(**{"ready": True, "reason": "epoch 1 serves", "epoch": 1} | changes)
        self.status = SimpleNamespace(remote=self._status)
        self.report_open = SimpleNamespace(remote=self._report_open)
        self.reports: list[tuple[str, int]] = []
        self.left_s: float | None = None

    async def _report_open(self, ingress_id: str, answers: int, refused_tokens: int) -> float | None:
        self.reports.append((ingress_id, answers))
        self.refused_tokens = refused_tokens
        return self.left_s

    async def _status(self, traceparent: str) -> CoordinatorStatus:
        self.asked += 1
        await asyncio.sleep(0)
        return self.answer


Make = Callable[..., ServeEngineClient]


def request(number: int = 0) -> Request:
    return Request(f"r{number}", (1, 2), 4, Sampling())


async def read(client: ServeEngineClient, number: int = 0) -> int:
    return sum([len(events) async for events in client.generate(request(number))])


def at_once(request: Request) -> list[TokenEvent]:
    return [token(request.request_id, 5), TokenEvent(request.request_id, (), None, finish_reason="length")]


def lose(worker: ScriptedWorker) -> None:
    """As its death does: all its connections end."""
    for ingress in list(worker.server._ingresses):
        worker.server._loop.call_soon_threadsafe(ingress.channel.abort)


def one_more(request: Request, end: EndReason | None = None) -> list[TokenEvent]:
    """A worker that counts: the token after the answer's first n is n."""
    done = len(request.answered)
    return [TokenEvent(request.request_id, (done,), None, finish_reason=end, index=done)]


async def collect(batches: AsyncIterator[Sequence[TokenEvent]]) -> list[TokenEvent]:
    return [event async for events in batches for event in events]


def spelt(events: Sequence[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def counted(telemetry: Telemetry, name: str) -> float | None:
    return telemetry.metrics.registry.get_sample_value(f"divisi_{name}_total")
