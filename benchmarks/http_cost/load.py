"""The load generator: many streams at once over plain sockets, in a process of its own, pinned to a core."""

from __future__ import annotations

import json
import multiprocessing
import os
import selectors
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

_END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Taken:
    """What a burst of streams brought."""

    seconds: float
    cpu_seconds: float
    first: bytes
    """One whole response, for a check."""
    same: bool
    """Whether the bodies are of equal length: all streams carry the same tokens."""


class LoadGenerator:
    """Opens `streams` connections, asks on each, and reads until all have ended."""

    def __init__(self, core: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(core, theirs), daemon=True)
        self._process.start()

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()

    def take(self, port: int, path: str, body: dict[str, object], streams: int) -> Taken:
        """Run one burst."""
        self._pipe.send((port, path, body, streams))
        taken: Taken = self._pipe.recv()
        return taken


def _work(core: int | None, pipe: Connection) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    while True:
        pipe.send(_burst(*pipe.recv()))


def _burst(port: int, path: str, body: dict[str, object], streams: int) -> Taken:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    request = head.encode() + content
    pieces: dict[socket.socket, list[bytes]] = {}
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        selector.register(connection, selectors.EVENT_READ)
        pieces[connection] = []
    started, cpu = time.perf_counter(), time.process_time()
    for connection in pieces:
        connection.sendall(request)
    left = streams
    while left:
        for key, _ in selector.select():
            ready = key.fileobj
            assert isinstance(ready, socket.socket)
            data = ready.recv(2**18)
            pieces[ready].append(data)
            if not data or data.endswith(_END):
                selector.unregister(ready)
                left -= 1
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    responses = [b"".join(parts) for parts in pieces.values()]
    for connection in pieces:
        connection.close()
    sizes = {len(response.partition(b"\r\n\r\n")[2]) for response in responses}
    return Taken(seconds, cpu, responses[0], len(sizes) == 1)
