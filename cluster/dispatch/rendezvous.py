"""Where the ranks of an epoch meet: a small key-value store behind a door, in the coordinator's process.

A question is a byte, an epoch (u64), a wait in seconds (f64), and keys or a key and a value with zeros between; an
answer is a byte and a value. Nothing in it is code.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from divisi.cluster.door import Channel, Credentials, DoorError, Line, open_door
from divisi.cluster.seats import Address

_dist: Any = torch.distributed  # the stubs lack what a store of one's own overrides
_SET, _GET, _CHECK = b"S", b"G", b"C"
_YES, _NO = b"1", b"0"
_QUESTION = struct.Struct("<cQd")
_EPOCHS = 4
"""The latest ones, of which values are kept."""
_START_S = 10.0
_MOST_VALUES = 100_000
"""Of an epoch: far more than any gang's."""


class StoreServer:
    """Hosts the store. Lives in the coordinator's process, through all epochs, in a thread of its own."""

    def __init__(self, host: str, credentials: Credentials) -> None:
        """Raises DoorError where it cannot listen."""
        self._values: dict[int, dict[str, bytes]] = {}
        """By epoch, of the latest ones."""
        self._credentials = credentials
        self._opened = threading.Event()
        self._error: DoorError | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(host)), name="rendezvous", daemon=True)
        self._thread.start()
        self._opened.wait(_START_S)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop listening, from any thread; who asks then is told nothing."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join(_START_S)

    async def _serve(self, host: str) -> None:
        self._changed, self._closed = asyncio.Condition(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            door = await open_door(Address(host), self._credentials.secret, self._accept, self._credentials.tls)
        except DoorError as error:
            self._error = error
            self._opened.set()
            return
        place = door.place
        assert isinstance(place, Address)
        self.address = place
        self._opened.set()
        await self._closed.wait()
        await door.close()

    async def _accept(self, channel: Channel) -> None:
        while True:
            for question in await channel.receive():
                channel.send([await self._answer(question)])

    async def _answer(self, question: bytes) -> bytes:
        kind, epoch, wait_s = _QUESTION.unpack_from(question)
        rest = question[_QUESTION.size :]
        if kind == _SET:
            key, _, value = rest.partition(b"\0")
            await self._set(epoch, key.decode(), value)
            return _YES
        keys = rest.decode().split("\0")

        def told() -> bool:
            return all(key in self._values.get(epoch, ()) for key in keys)

        async with self._changed:
            try:
                async with asyncio.timeout(max(wait_s, 0.0)):
                    await self._changed.wait_for(told)
            except TimeoutError:
                return _NO
            return _YES + (self._values[epoch][keys[0]] if kind == _GET else b"")

    async def _set(self, epoch: int, key: str, value: bytes) -> None:
        async with self._changed:
            values = self._values.setdefault(epoch, {})
            if len(values) < _MOST_VALUES:
                values[key] = value
            while len(self._values) > _EPOCHS:
                del self._values[min(self._values)]
            self._changed.notify_all()


class DoorStore(_dist.Store):  # type: ignore[misc]  # torch has no types for it
    """One rank's end: what gloo and NCCL ask for, of one epoch."""

    def __init__(self, place: Address, epoch: int, credentials: Credentials, timeout_s: float) -> None:
        """Raises RuntimeError, as torch's own stores do, here and elsewhere."""
        super().__init__()
        self._epoch, self._timeout_s = epoch, timeout_s
        self._clone = partial(DoorStore, place, epoch, credentials, timeout_s)
        try:
            self._line = Line(place, credentials.secret, time.monotonic() + timeout_s, credentials.tls)
        except DoorError as error:
            raise RuntimeError(str(error)) from error

    def set(self, key: str, value: str | bytes) -> None:
        """Tell all who ask for it."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask(_SET, 0.0, f"{key}\0".encode() + data)

    def get(self, key: str) -> bytes:
        """What was told, once it is."""
        answer = self._ask(_GET, self._timeout_s, key.encode())
        if answer[:1] != _YES:
            raise RuntimeError(f"nobody told {key} within {self._timeout_s:g} s")
        return answer[1:]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all were told."""
        wait_s = self._timeout_s if timeout is None else timeout.total_seconds()
        if not self._look(keys, wait_s):
            raise RuntimeError(f"nobody told one of {', '.join(keys)} within {wait_s:g} s")

    def check(self, keys: list[str]) -> bool:
        """Whether all were told."""
        return self._look(keys, 0.0)

    def clone(self) -> DoorStore:
        """Over a connection of its own, for another thread."""
        return self._clone()

    def close(self) -> None:
        """End the connection."""
        self._line.close()

    def _look(self, keys: list[str], wait_s: float) -> bool:
        return self._ask(_CHECK, wait_s, "\0".join(keys).encode())[:1] == _YES

    def _ask(self, kind: bytes, wait_s: float, rest: bytes) -> bytes:
        deadline = time.monotonic() + wait_s + self._timeout_s
        try:
            self._line.send(_QUESTION.pack(kind, self._epoch, wait_s) + rest, deadline)
            return self._line.receive(deadline)
        except DoorError as error:
            raise RuntimeError(str(error)) from error
