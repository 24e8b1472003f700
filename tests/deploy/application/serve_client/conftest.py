"""An ingress's end of a gang whose coordinator and workers are scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from divisi.cluster.seats import GangShape, StreamAddress
from divisi.deploy.application import serve_client
from divisi.deploy.application.serve_client import ServeEngineClient
from divisi.deploy.limits import Gate, GateLimits
from tests.deploy.application.serve_client.support import Coordinator
from tests.support.scripted_worker import HOST, SECRET, ScriptedWorker, running
from tests.support.thread_gang import small_spec


@pytest.fixture(autouse=True)
def outside_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_client, "gang_secret", lambda spec: SECRET)
    monkeypatch.setattr(serve_client.ray.util, "get_node_ip_address", lambda: HOST)


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def address(worker: ScriptedWorker) -> Iterator[StreamAddress]:
    with running(worker) as opened:
        yield opened


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch, address: StreamAddress) -> Coordinator:
    found = Coordinator(streams=(address,))
    monkeypatch.setattr(serve_client, "find_coordinator", lambda name: found)
    return found


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., ServeEngineClient]]:
    made: list[ServeEngineClient] = []

    def make(gate: Gate | None = None, **given: Any) -> ServeEngineClient:
        spec = small_spec(Path("m"), GangShape(1, 0))
        made.append(ServeEngineClient(spec, gate or Gate(GateLimits()), "me", **given))
        return made[-1]

    yield make
    for client in made:
        await client._connections.close()
