"""A scripted worker behind a real socket, and an ingress connected to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from divisi.cluster.seats import StreamAddress
from divisi.cluster.streams.client import WorkerConnection
from divisi.cluster.streams.workers import WorkerConnections
from tests.support.scripted_worker import ScriptedWorker, connected, only, running


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def address(worker: ScriptedWorker) -> Iterator[StreamAddress]:
    with running(worker) as opened:
        yield opened


@pytest.fixture
async def connections(address: StreamAddress) -> AsyncIterator[WorkerConnections]:
    async with connected(address) as opened:
        yield opened


@pytest.fixture
def connection(connections: WorkerConnections) -> WorkerConnection:
    return only(connections)
