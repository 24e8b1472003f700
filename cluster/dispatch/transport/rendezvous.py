"""Where the ranks of an epoch meet: a small key-value store behind a door, in the coordinator's process. No torch.

A question is a byte, an epoch (u64), a wait in seconds (f64), and keys or a key and a value with zeros between; an
answer is a byte and a value. Nothing in it is code.
"""

from __future__ import annotations

import asyncio
import struct
import threading

from divisi.cluster.door import Channel, Credentials, DoorError, open_door
from divisi.cluster.seats import Address

SET, GET, CHECK = b"S", b"G", b"C"
YES, NO = b"1", b"0"
QUESTION = struct.Struct("<cQd")
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
        kind, epoch, wait_s = QUESTION.unpack_from(question)
        rest = question[QUESTION.size :]
        if kind == SET:
            key, _, value = rest.partition(b"\0")
            await self._set(epoch, key.decode(), value)
            return YES
        keys = rest.decode().split("\0")

        def told() -> bool:
            return all(key in self._values.get(epoch, ()) for key in keys)

        async with self._changed:
            try:
                async with asyncio.timeout(max(wait_s, 0.0)):
                    await self._changed.wait_for(told)
            except TimeoutError:
                return NO
            return YES + (self._values[epoch][keys[0]] if kind == GET else b"")

    async def _set(self, epoch: int, key: str, value: bytes) -> None:
        async with self._changed:
            values = self._values.setdefault(epoch, {})
            if len(values) < _MOST_VALUES:
                values[key] = value
            while len(self._values) > _EPOCHS:
                del self._values[min(self._values)]
            self._changed.notify_all()
