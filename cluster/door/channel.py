"""One authenticated connection on an event loop: payloads out without waiting, payloads in by wake-up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from divisi.cluster.door.errors import ChannelClosed, DoorError
from divisi.cluster.door.framer import MAX_FRAME, Framer
from divisi.cluster.door.handshake import Handshake

STRANGER_BYTES = 1024
"""Read of a connection that hasn't proved anything yet."""
_READ_BYTES = 64 * 1024
_UNREAD_BYTES = 4 * 1024 * 1024
"""Arrived and not asked for; above it nothing more is read, and the sender's `buffered` grows."""
_FLUSH_S = 2.0
_CREDENTIALS = struct.Struct("3i")
"""Process, user and group."""
_SILENT_S = 20.0
"""After so long without an acknowledgement by the other machine's kernel, a TCP connection is given up."""


class Channel(asyncio.BufferedProtocol):
    """Made by `connect` and by a door, which hands it out once the handshake is done.

    For one task that receives and any that send, all on the connection's loop.
    """

    def __init__(self, begin: Callable[[asyncio.BaseTransport], Handshake], peer: str) -> None:
        """`begin` makes the handshake of a connection that stands; `peer` is the other side's name for people."""
        self._begin = begin
        self.peer = peer
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """The handshake's outcome; DoorError where it failed."""
        self._transport: asyncio.Transport | None = None
        self._handshake: Handshake | None = None
        self._framer: Framer | None = None
        self._buffer = memoryview(bytearray(STRANGER_BYTES))
        self._arrived: list[bytes] = []
        self._arrived_bytes = 0
        self._reading = True
        self._waiter: asyncio.Future[None] | None = None
        self._parcels: deque[Iterator[bytes]] = deque()
        self._parcels_bytes = 0
        self._writing = True
        self._end: str | None = None
        self._killer: asyncio.TimerHandle | None = None
        self._gone = asyncio.Event()

    @property
    def buffered(self) -> int:
        """Bytes that were sent and that the kernel has not taken yet."""
        return self._parcels_bytes + (self._transport.get_write_buffer_size() if self._transport is not None else 0)

    @property
    def process(self) -> int | None:
        """The other side's process id, as the kernel has it, where that is a process of this machine."""
        connection = None if self._transport is None else self._transport.get_extra_info("socket")
        if connection is None or connection.family != socket.AF_UNIX:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return _CREDENTIALS.unpack(credentials)[0] or None  # 0 stands for one that this container does not see

    def send(self, payloads: Sequence[bytes]) -> None:
        """Send without waiting, whatever the other side does: who sends watches `buffered`. Raises ChannelClosed.

        Payloads arrive in order, except that those of more than `MAX_FRAME` bytes are overtaken by shorter ones and
        take turns among themselves: what makes sense only after a long one has to wait for an answer to it.
        """
        if self._end is not None:
            raise ChannelClosed(self._end)
        assert self._framer is not None
        assert self._transport is not None
        frames = [self._framer.seal(payload) for payload in payloads if len(payload) <= MAX_FRAME]
        if frames:
            self._transport.write(frames[0] if len(frames) == 1 else b"".join(frames))
        for payload in payloads:
            if len(payload) > MAX_FRAME:
                self._parcels.append(self._framer.cut(payload))
                self._parcels_bytes += len(payload)
        self._send_pieces()

    async def receive(self) -> list[bytes]:
        """All payloads that have arrived, at least one. Raises ChannelClosed once there are none and will be none."""
        while not self._arrived:
            if self._end is not None:
                raise ChannelClosed(self._end)
            assert self._waiter is None, "two tasks receive from one channel"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        arrived, self._arrived, self._arrived_bytes = self._arrived, [], 0
        if not self._reading and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()
        return arrived

    def close(self) -> None:
        """End the connection once what was sent is out, or after 2 s. Again: nothing."""
        if self._end is None:
            self._send_pieces(flush=True)
        self._finish(f"the connection to {self.peer} was closed on this side")

    async def wait_closed(self) -> None:
        """Until the socket is gone."""
        await self._gone.wait()

    def abort(self) -> None:
        """End the connection at once."""
        self._finish(f"the connection to {self.peer} was ended on this side")
        if self._transport is not None:
            self._transport.abort()

    # The rest is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.BaseProtocol."""
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        self._gone.clear()
        if self._end is not None:  # nobody waits for it any more
            transport.abort()
            return
        notice_silence(transport.get_extra_info("socket"))
        self._handshake = self._begin(transport)
        if greeting := self._handshake.begin():
            transport.write(greeting)

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        data: bytes | memoryview = self._buffer[:nbytes]
        try:
            if self._framer is None:
                data = self._shake_hands(data)
            if self._framer is not None:
                self._take(self._framer.feed(data))
        except DoorError as error:
            self._fail(error)

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._writing = False

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        self._writing = True
        self._send_pieces()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.BaseProtocol."""
        how = f"failed: {exc}" if exc is not None else "was closed by the other side"
        self._note_end(f"the connection to {self.peer} {how}")
        if self._killer is not None:
            self._killer.cancel()
        self._parcels.clear()
        self._parcels_bytes = 0
        self._gone.set()

    def _shake_hands(self, data: bytes | memoryview) -> bytes:
        """What is left of the data for the framer."""
        assert self._handshake is not None
        assert self._transport is not None
        if reply := self._handshake.feed(data):
            self._transport.write(reply)
        if not self._handshake.done:
            return b""
        self._framer, rest = self._handshake.finish()
        self._handshake = None
        self._buffer = memoryview(bytearray(_READ_BYTES))
        if not self.ready.done():
            self.ready.set_result(None)
        return rest

    def _take(self, payloads: list[bytes]) -> None:
        if not payloads:
            return
        self._arrived += payloads
        self._arrived_bytes += sum(map(len, payloads))
        if self._arrived_bytes > _UNREAD_BYTES and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()
        self._wake()

    def _send_pieces(self, flush: bool = False) -> None:
        """Of each parcel in turn, as long as the transport takes them; `flush`: all there are."""
        while self._parcels and self._transport is not None and (self._writing or flush):
            parcel = self._parcels.popleft()
            if (piece := next(parcel, None)) is not None:
                self._parcels.append(parcel)
                self._parcels_bytes = max(self._parcels_bytes - len(piece), 0)
                self._transport.write(piece)
        if not self._parcels:
            self._parcels_bytes = 0

    def _fail(self, error: DoorError) -> None:
        """The other side broke the protocol."""
        self._note_end(f"{self.peer}: {error}", error)
        if self._transport is not None:
            self._transport.abort()

    def _finish(self, how: str) -> None:
        if self._end is not None:
            return
        self._note_end(how)
        if self._transport is None:
            self._gone.set()
            return
        self._transport.close()
        self._killer = asyncio.get_running_loop().call_later(_FLUSH_S, self._transport.abort)

    def _note_end(self, how: str, error: DoorError | None = None) -> None:
        if self._end is None:
            self._end = how
            self._wake()
            if not self.ready.done():
                self.ready.set_exception(error or ChannelClosed(how))
                self.ready.exception()  # nobody may be waiting for it

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def notice_silence(connection: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other machine is gone without a word."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # a platform may lack one of them
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SILENT_S * 1000))
