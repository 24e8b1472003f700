"""`transports`: what could carry a step's events from a worker to an ingress: the door's channel, asyncio, pyzmq.

One process stands for the worker: a thread hands over a message at each step, as the step loop does. Another stands for
the ingress: an event loop. Only pyzmq's blocking sender is called by the thread itself. pyzmq comes with `.[bench]`.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from divisi.benchmarks import machine
from divisi.cluster.door import Channel, ChannelClosed, Secret, connect, open_door
from divisi.cluster.streams.wire import Events, encode

STREAMS, STEP_S = 64, 0.005
_STAMP = struct.Struct("d")
_LENGTH = struct.Struct("I")
_KEY = Secret(bytes(range(32)))
_OPEN_S = 10.0

Take = Callable[[bytes], None]
Hand = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to send: each side runs in a process of its own, told the folder for its socket."""

    name: str
    send: Callable[[Path, Callable[[Hand], None]], Coroutine[Any, Any, None]]
    """Calls its argument, in a thread, with what hands a message over."""
    receive: Callable[[Path, Take], Coroutine[Any, Any, None]]
    """Gives each message to its argument until an empty one has come."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m divisi.benchmarks transports`."""
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, interleaved (default 5)")
    parser.add_argument("--messages", type=int, default=800, help="in a round, of each contender (default 800)")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    payload = message()
    contenders = [CHANNEL, STREAMS_OF_ASYNCIO, ZMQ_LOOP, ZMQ_THREAD]
    found: dict[str, list[tuple[float, float, float]]] = {contender.name: [] for contender in contenders}
    for _ in range(options.rounds):
        for contender in contenders:
            found[contender.name].append(measure(contender, payload, options.messages))
    print(machine.describe())
    print(
        f"\n{options.messages} messages of {len(payload)} bytes ({STREAMS} events), one every {STEP_S * 1e3:g} ms, "
        f"Unix sockets, {options.rounds} rounds, medians\n\n"
        "| | CPU us per message, worker | ingress | us on the way, median |\n|---|---|---|---|"
    )
    for name, rounds in found.items():
        figures = [statistics.median(column) for column in zip(*rounds, strict=True)]
        print(f"| {name} | {' | '.join(f'{figure:.0f}' for figure in figures)} |")
    return 0


def message() -> bytes:
    """A step's events of 64 streams."""
    return encode(Events(list(range(STREAMS)), [1000 * number + 7 for number in range(STREAMS)]))


def measure(contender: Contender, payload: bytes, messages: int) -> tuple[float, float, float]:
    """Microseconds per message: processor time of the sender and of the receiver, and the median time on the way."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = context.Pipe()
        folder = Path(name) / "sockets"
        folder.mkdir(mode=0o700)
        process = context.Process(target=_sender, args=(contender.name, folder, payload, messages, theirs), daemon=True)
        process.start()
        late: list[float] = []
        if not ours.poll(_OPEN_S):
            raise SystemExit(f"{contender.name}: the sender has not begun within {_OPEN_S:g} s")
        ours.recv()
        began = time.process_time()

        def take(data: bytes) -> None:
            late.append(time.monotonic() - _STAMP.unpack_from(data)[0])

        asyncio.run(contender.receive(folder, take))
        received = time.process_time() - began
        sent = ours.recv()
        process.join(_OPEN_S)
    if len(late) != messages:
        raise SystemExit(f"{contender.name}: {len(late)} of {messages} messages arrived")
    return sent / messages * 1e6, received / messages * 1e6, statistics.median(late) * 1e6


def _sender(name: str, folder: Path, payload: bytes, messages: int, result: Connection) -> None:
    (contender,) = (one for one in (CHANNEL, STREAMS_OF_ASYNCIO, ZMQ_LOOP, ZMQ_THREAD) if one.name == name)
    spent: list[float] = []

    def steps(hand: Hand) -> None:
        began, due = time.process_time(), time.monotonic()
        for _ in range(messages):
            due += STEP_S
            time.sleep(max(due - time.monotonic(), 0.0))  # the step
            hand(_STAMP.pack(time.monotonic()) + payload)
        spent.append(time.process_time() - began)
        hand(b"")

    result.send("begun")
    asyncio.run(contender.send(folder, steps))
    result.send(spent[0])


async def _in_thread(steps: Callable[[Hand], None], hand: Hand) -> None:
    """Run the steps; each message is handed to the loop, as the step loop does."""
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(steps, lambda data: loop.call_soon_threadsafe(hand, data))


async def _channel_send(folder: Path, steps: Callable[[Hand], None]) -> None:
    done = asyncio.Event()

    async def serve(channel: Channel) -> None:
        await _in_thread(steps, lambda data: channel.send([data or b"\0"]))
        done.set()
        try:
            await channel.receive()
        except ChannelClosed:
            return

    door = await open_door(folder / "s", _KEY, serve)
    await done.wait()
    await asyncio.sleep(0.1)  # the last message is on its way
    await door.close()


async def _channel_receive(folder: Path, take: Take) -> None:
    await _appear(folder / "s")
    channel = await connect(folder / "s", _KEY, _OPEN_S)
    while True:
        for data in await channel.receive():
            if len(data) <= 1:
                channel.close()
                return
            take(data)


async def _streams_send(folder: Path, steps: Callable[[Hand], None]) -> None:
    done = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _in_thread(steps, lambda data: writer.write(_LENGTH.pack(len(data)) + data))
        await writer.drain()
        done.set()

    # Under its name once it listens: who finds it there connects.
    server = await asyncio.start_unix_server(serve, folder / "new")
    (folder / "new").rename(folder / "s")
    await done.wait()
    server.close()


async def _streams_receive(folder: Path, take: Take) -> None:
    await _appear(folder / "s")
    reader, writer = await asyncio.open_unix_connection(folder / "s")
    while length := _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]:
        take(await reader.readexactly(length))
    writer.close()


async def _zmq_loop_send(folder: Path, steps: Callable[[Hand], None]) -> None:
    zmq, in_loop = import_module("zmq"), import_module("zmq.asyncio")
    with in_loop.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.bind(f"ipc://{folder}/s")
        await _in_thread(steps, pair.send)


async def _zmq_thread_send(folder: Path, steps: Callable[[Hand], None]) -> None:
    zmq = import_module("zmq")
    with zmq.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.bind(f"ipc://{folder}/s")
        thread = threading.Thread(target=steps, args=(pair.send,))
        thread.start()
        thread.join()


async def _zmq_receive(folder: Path, take: Take) -> None:
    zmq, in_loop = import_module("zmq"), import_module("zmq.asyncio")
    with in_loop.Context() as context, context.socket(zmq.PAIR) as pair:
        pair.connect(f"ipc://{folder}/s")
        while data := await pair.recv():
            take(data)


async def _appear(path: Path) -> None:
    async with asyncio.timeout(_OPEN_S):
        while not path.exists():
            await asyncio.sleep(0.01)  # a file that appears wakes nobody


CHANNEL = Contender("the door's channel (authenticated)", _channel_send, _channel_receive)
STREAMS_OF_ASYNCIO = Contender("asyncio streams, lengths only", _streams_send, _streams_receive)
ZMQ_LOOP = Contender("pyzmq, its asyncio sockets", _zmq_loop_send, _zmq_receive)
ZMQ_THREAD = Contender("pyzmq, sent by the thread itself", _zmq_thread_send, _zmq_receive)
