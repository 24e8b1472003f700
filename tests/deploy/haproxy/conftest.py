"""A real HAProxy as Ray would run it for us, and a replica behind it that does what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from divisi.deploy.haproxy.environment import Front, haproxy
from tests.support.ports import free_port

_MANAGER = str(Path(__file__).parents[2] / "support" / "haproxy_manager.py")
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


@dataclass
class Replica:
    """An ASGI application: /echo tells what came, /stream sends a line for each `go` and sees its client leave."""

    left: threading.Event = field(default_factory=threading.Event)
    port: int = field(default_factory=free_port)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    go: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/stream":
            await self._stream(receive, send)
            return
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        told = {"method": scope["method"], "version": scope["http_version"], "size": size, "headers": headers}
        body = json.dumps(told | {"port": self.port}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
            (b"x-request-id", headers.get("x-request-id", "its own").encode()),
        ]})  # fmt: skip
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        writing = asyncio.ensure_future(self._write(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        self.left.set()

    async def _write(self, send: Send) -> None:
        while True:
            await self.go.acquire()
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})

    def next(self) -> None:
        """Let a stream send its next line."""
        self.loop.call_soon_threadsafe(self.go.release)


@contextmanager
def running(replica: Replica) -> Iterator[Replica]:
    """Serve it in a thread."""
    server = uvicorn.Server(uvicorn.Config(replica, port=replica.port, log_level="critical", lifespan="off"))
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=lambda: replica.loop.run_until_complete(server.serve()), daemon=True)
    thread.start()
    try:
        yield replica
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


@dataclass
class Manager:
    """HAProxy, and the process that manages it."""

    url: str
    folder: Path
    environment: dict[str, str]
    replicas: list[int]
    process: subprocess.Popen[str] | None = None
    pid: int = 0

    def start(self) -> None:
        """As Ray does when it has found none."""
        command = [sys.executable, _MANAGER, self.url.rpartition(":")[2], *map(str, self.replicas)]
        self.process = subprocess.Popen(command, env=os.environ | self.environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        self._read_pid()

    def tell(self, *replicas: int) -> None:
        """The replicas have changed; a new HAProxy takes over."""
        assert self.process is not None
        assert self.process.stdin is not None
        print(*replicas, file=self.process.stdin, flush=True)
        self._read_pid()

    def _read_pid(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "HAProxy could not be started"
        self.pid = int(line)


@contextmanager
def managed(*replicas: int, longest_answer_s: float | None = None) -> Iterator[Manager]:
    port, said, folders = free_port(), list[str](), list[Path]()
    with haproxy(Front("127.0.0.1", port, longest_answer_s), folders.append, said.append) as environment:
        assert not said
        manager = Manager(f"http://127.0.0.1:{port}", folders[0], environment, list(replicas))
        manager.start()
        try:
            yield manager
        finally:
            assert manager.process is not None
            manager.process.communicate(timeout=20)


@pytest.fixture(scope="package")
def replica() -> Iterator[Replica]:
    with running(Replica()) as replica:
        yield replica


@pytest.fixture(scope="package")
def manager(replica: Replica) -> Iterator[Manager]:
    with managed(replica.port) as manager:
        yield manager
