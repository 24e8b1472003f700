"""Connections of the control mesh, tuned for small messages, and how a loop waits for them. Imports no torch.

Both sides prove to know the gang's secret before anything else is read, and each message is authenticated. A closed
connection, a deadline that passes and an interrupted epoch raise StepAborted.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

from divisi.cluster.door import DoorError, Framer, Handshake
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.header import Message, MessageReader
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.seats import Seat

_CHUNK = 65536
_STRANGER_BYTES = 1024


def listen(host: str) -> socket.socket:
    """The control listener of a possible leader, on a free port; it outlives epochs."""
    listener = socket.create_server((host, 0), backlog=1024)
    listener.setblocking(False)
    return listener


class HasFd(Protocol):
    """Something that `poll` can wait for."""

    def fileno(self) -> int:
        """Its file descriptor."""
        ...


class Peer:
    """One connection."""

    def __init__(
        self, connection: socket.socket, unheard_s: float, handshake: Handshake, seat: Seat | None = None
    ) -> None:
        """Of a seat that is not known before it says hello. It fails once the other host has confirmed nothing of what
        was sent for `unheard_s`. Raises StepAborted."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unheard_s * 1000))
        self._socket = connection
        self._handshake = handshake
        self._framer: Framer | None = None
        self._reader = MessageReader()
        self.seat = seat
        self._put(handshake.begin())

    @property
    def is_inside(self) -> bool:
        """Whether the other side has proved to know the secret."""
        return self._framer is not None

    @property
    def who(self) -> str:
        """For people."""
        return "a rank that said no hello" if self.seat is None else str(self.seat)

    def fileno(self) -> int:
        """Its file descriptor."""
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Messages are smaller than a socket's buffer: one that doesn't fit has a peer that is stuck.

        Raises StepAborted.
        """
        assert self._framer is not None, "it says nothing to who has proved nothing"
        self._put(self._framer.seal(data))

    def _put(self, data: bytes) -> None:
        try:
            sent = self._socket.send(data) if data else 0
        except OSError as error:
            raise StepAborted(f"control connection failed: {error}", self.who) from error
        if sent != len(data):
            raise StepAborted("control connection is stuck", self.who)

    def receive(self) -> list[Message]:
        """What has arrived, without waiting. Raises StepAborted, and HandshakeFailed for a stranger."""
        try:
            data = self._socket.recv(_CHUNK if self.is_inside else _STRANGER_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise StepAborted(f"control connection failed: {error}", self.who) from error
        if not data:
            raise StepAborted("control connection was closed", self.who)
        if self._framer is None:
            self._put(self._handshake.feed(data))
            if not self._handshake.done:
                return []
            self._framer, data = self._handshake.finish()
        try:
            return self._reader.feed(b"".join(self._framer.feed(data)))
        except (ValueError, DoorError) as error:
            raise StepAborted(f"control connection carries something else: {error}", self.who) from error

    def close(self) -> None:
        """Drop it, which the other side notices."""
        self._socket.close()


Source = TypeVar("Source", bound="HasFd")


def wait_for(
    sources: Sequence[Source], inbox: EpochInbox, epoch: int, deadline: float | None, waiting_for: str
) -> list[Source]:
    """Sources that can be read; empty after a wake-up. Raises StepAborted on a deadline or at the epoch's end."""
    left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
    ready, woken = look(sources, inbox, epoch, left_s)
    if not ready and not woken:
        raise StepAborted("did not answer before its deadline", waiting_for)
    return ready


def look(
    sources: Sequence[Source], inbox: EpochInbox, epoch: int, timeout_s: float | None
) -> tuple[list[Source], bool]:
    """Sources that can be read, and whether the loop was woken: it must then look what for before it parks.

    Raises StepAborted at the epoch's end.
    """
    # poll, not select: it takes file descriptors above 1024, which a busy server reaches.
    poller = select.poll()
    by_fd: dict[int, Source] = {source.fileno(): source for source in sources}
    for fd in (*by_fd, inbox.wake.fileno()):
        poller.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(None if timeout_s is None else timeout_s * 1000)}
    woken = inbox.wake.fileno() in ready
    if woken:
        inbox.wake.clear()
    inbox.check(epoch)
    return [by_fd[fd] for fd in ready if fd in by_fd], woken
