"""A worker that answers as a test tells it to, behind real sockets; and a connection to it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from divisi.cluster.door import Secret
from divisi.cluster.request import EndReason, Request, Sampling, TokenEvent
from divisi.cluster.seats import StreamAddress
from divisi.cluster.streams.client import TokenStream, WorkerConnection
from divisi.cluster.streams.places import stream_address
from divisi.cluster.streams.server import StreamServer
from divisi.cluster.streams.wire import Report
from divisi.cluster.streams.workers import WorkerConnections

HOST = "127.0.0.1"
SECRET = Secret(b"s" * 32)


class ScriptedWorker:
    """Implements `streams.server.Worker`; notes what it is asked."""

    def __init__(self) -> None:
        self.server = StreamServer(self)
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.refuses = ""
        self.errors: list[Exception] = []
        self.script: Callable[[Request], list[TokenEvent]] | None = None
        """The answer of every request, if it comes at once."""
        self.load = Report(0, 0, 1000)
        self.reports = 0

    def refusal(self) -> str:
        return self.refuses

    def submit(self, request: Request) -> Future[None]:
        self.requests.append(request)
        taken: Future[None] = Future()
        if self.errors:
            taken.set_exception(self.errors.pop(0))
            return taken
        taken.set_result(None)
        if self.script is not None:
            self.server.deliver(self.script(request))
        return taken

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def report(self) -> Future[Report]:
        self.reports += 1
        found: Future[Report] = Future()
        found.set_result(self.load)
        return found


def token(name: str, token_id: int, end: EndReason | None = None) -> TokenEvent:
    return TokenEvent(name, (token_id,), None, finish_reason=end)


@contextlib.contextmanager
def running(worker: ScriptedWorker) -> Iterator[StreamAddress]:
    """The worker's doors are open."""
    with tempfile.TemporaryDirectory(prefix="d") as folder:  # pytest's own is too long for a socket's path
        places = worker.server.start([Path(folder) / "worker"], SECRET)
        try:
            yield stream_address(HOST, places)
        finally:
            worker.server.close()


@contextlib.asynccontextmanager
async def connected(*addresses: StreamAddress) -> AsyncIterator[WorkerConnections]:
    """The connections of one ingress, once all of the workers take requests."""
    connections = WorkerConnections(HOST, SECRET)
    connections.name(addresses)
    try:
        await until(lambda: len(connections.able()) == len(addresses))
        yield connections
    finally:
        await connections.close()


def only(connections: WorkerConnections) -> WorkerConnection:
    (connection,) = connections.able()
    return connection


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.001)


def request(name: str, prompt: int = 3, **fields: object) -> Request:
    return Request(name, (1,) * prompt, 4, Sampling(), **fields)  # type: ignore[arg-type]


async def read(stream: TokenStream) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    async with asyncio.timeout(10):
        while not events or events[-1].finish_reason is None:
            events += await stream.take()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]
