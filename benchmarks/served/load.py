"""The load: streams over plain sockets, each with one request after another, in a process of its own.

It only keeps what arrives and when; what it means is looked at when all is over, so that a client on the server's cores
costs little.
"""

from __future__ import annotations

import json
import multiprocessing
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from divisi.benchmarks.served.answer import Answer, ended, read_answer

_SMALL_BUFFER = 4096
_DEADLINE_S = 240.0


@dataclass(frozen=True, slots=True)
class Stream:
    """What one client asks for, one request after another. `pause_s`: stop reading for so long after the first byte."""

    bodies: Sequence[dict[str, Any]]
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Burst:
    """What streams that began at once brought."""

    seconds: float
    cpu_seconds: float
    """Of the client."""
    answers: tuple[tuple[Answer, ...], ...]
    """By stream."""

    @property
    def tokens(self) -> int:
        """All that were generated."""
        return sum(answer.tokens for answers in self.answers for answer in answers)


class LoadGenerator:
    """The process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()

    def run(self, url: str, streams: Sequence[Stream]) -> Burst:
        """Run all streams to their ends. Exits where an answer is no stream of events that ends well."""
        self._pipe.send((url, streams))
        found: Burst | str = self._pipe.recv()
        if isinstance(found, str):
            raise SystemExit(f"{url}: {found}")
        return found


def _work(pipe: Connection) -> None:
    while True:
        url, streams = pipe.recv()
        try:
            pipe.send(_run(url, streams))
        except (OSError, ValueError) as error:
            pipe.send(f"{type(error).__name__}: {error}")


@dataclass
class _Reading:
    """A request under way, and those of the same stream that come after it."""

    asked_at: float
    left: list[bytes]
    pause_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    tail: bytes = b""


def _run(url: str, streams: Sequence[Stream]) -> Burst:
    parts = urlsplit(url)
    place, selector = (parts.hostname or "", parts.port or 80), selectors.DefaultSelector()
    requests = [[_request(parts.netloc, parts.path, body) for body in stream.bodies] for stream in streams]
    done: list[list[_Reading]] = [[] for _ in streams]
    asleep: list[tuple[float, socket.socket, tuple[int, _Reading]]] = []
    started, cpu = time.perf_counter(), time.process_time()
    for number, stream in enumerate(streams):
        _ask(selector, place, number, requests[number], stream.pause_s)
    while selector.get_map() or asleep:
        now = time.perf_counter()
        if now - started > _DEADLINE_S:
            raise TimeoutError(f"{len(selector.get_map())} streams have not ended after {_DEADLINE_S:g} s")
        for waking in [entry for entry in asleep if entry[0] <= now]:
            asleep.remove(waking)
            selector.register(waking[1], selectors.EVENT_READ, waking[2])
        for key, _ in selector.select(0.05 if asleep else 1.0):
            connection, (number, reading) = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            data = connection.recv(2**16)
            reading.pieces.append((time.perf_counter(), data))
            reading.tail = (reading.tail + data)[-8:]
            if not data or ended(reading.tail):
                selector.unregister(connection)
                connection.close()
                done[number].append(reading)
                if reading.left:
                    _ask(selector, place, number, reading.left, 0.0)
            elif reading.pause_s:
                selector.unregister(connection)
                asleep.append((time.perf_counter() + reading.pause_s, connection, (number, reading)))
                reading.pause_s = 0.0
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    answers = tuple(tuple(read_answer(each.asked_at, each.pieces) for each in readings) for readings in done)
    return Burst(seconds, cpu, answers)


def _ask(
    selector: selectors.BaseSelector, place: tuple[str, int], number: int, requests: list[bytes], pause_s: float
) -> None:
    reading = _Reading(time.perf_counter(), requests[1:], pause_s)
    connection = socket.socket()
    if pause_s:  # or the kernel would read on for the client
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    connection.settimeout(_DEADLINE_S)
    connection.connect(place)
    connection.sendall(requests[0])
    selector.register(connection, selectors.EVENT_READ, (number, reading))


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content
