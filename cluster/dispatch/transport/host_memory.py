"""Shared memory between ranks of one host: a pair uses it once both of them have opened the same segment.

The lower rank of a pair makes an anonymous segment (memfd) and hands it over a Unix socket. The socket's folder is in
the host's own memory and open to this user alone: a rank with another `/dev/shm`, as in another container, does not
find it, and the pair stays with gloo. The connection lasts as long as the segment, which is the epoch's: by its end a
rank notices that the other one is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from divisi.cluster.activity import Activity
from divisi.cluster.door import DoorError, private_folder
from divisi.cluster.errors import StepAborted
from divisi.kernels.native.loader import Library, load_library
from divisi.kernels.ring.ring import Outcome, Ring

log = logging.getLogger(__name__)

_HANDSHAKE_S = 2.0
_PAGE = 4096
_TOKEN = 16
_YES, _NO = b"1", b"0"
_SEALS = 0x1 | 0x2 | 0x4  # no more seals, no shrinking, no growing


class Store(Protocol):
    """Where the ranks of an epoch tell each other things; `get` waits until there is something."""

    def set(self, key: str, value: str) -> None:
        """Tell all who ask for it."""
        ...

    def get(self, key: str) -> bytes:
        """What was told, once it is. Raises RuntimeError where that takes too long."""
        ...


@dataclass(frozen=True, slots=True)
class HostMemory:
    """How ranks of one host share memory."""

    largest: int
    """Bytes of the longest message."""
    spin_s: float
    """How long who waits keeps its core; 0 where others need it."""
    folder: Path = field(default_factory=lambda: Path(f"/dev/shm/divisi-{os.geteuid()}"))
    """Where the sockets are, over which segments are handed."""

    def open(self, store: Store, rank: int, partners: Sequence[int], activity: Activity) -> dict[int, Segment]:
        """The segments with those of the partners that have opened them too. All ranks call it with the same store.

        `activity` is told of each wait for a message.
        """
        library = load_library()
        with contextlib.ExitStack() as stack:
            listener = self._listen(stack) if library is not None and any(p > rank for p in partners) else None
            store.set(f"memory/{rank}", "" if listener is None else listener.getsockname())
            called = {p: self._call(store.get(f"memory/{p}").decode(), rank, library) for p in partners if p < rank}
            for partner, connection in called.items():
                store.set(f"memory/{partner}/{rank}", (_NO if connection is None else _YES).decode())
            coming = [p for p in partners if p > rank and store.get(f"memory/{rank}/{p}") == _YES]
            accepted = {} if listener is None else _accept(listener, len(coming))
            if library is None:
                return {}
            offers = {p: self._offer(library, connection) for p, connection in accepted.items()}
            found = {p: self._take(library, connection) for p, connection in called.items() if connection is not None}
            found |= {p: _agreed(offer) for p, offer in offers.items() if offer is not None}
            return {p: segment.tell(activity) for p, segment in found.items() if segment is not None}

    @property
    def _ring_size(self) -> int:
        return -(-Ring.size(self.largest) // _PAGE) * _PAGE

    def _listen(self, stack: contextlib.ExitStack) -> socket.socket | None:
        path = self.folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            private_folder(self.folder)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            stack.callback(path.unlink, missing_ok=True)
            listener.listen(256)
        except (OSError, DoorError) as error:
            log.info("no segment can be handed over in %s: %s", self.folder, error)
            return None
        listener.settimeout(_HANDSHAKE_S)
        return listener

    def _call(self, path: str, rank: int, library: Library | None) -> socket.socket | None:
        if not path or library is None or Path(path).parent != self.folder:
            return None
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_HANDSHAKE_S)
        try:
            connection.connect(path)
            connection.sendall(rank.to_bytes(4, "little"))
        except OSError:
            connection.close()
            return None
        return connection

    def _offer(self, library: Library, connection: socket.socket) -> tuple[Segment, bytes] | None:
        """A new segment, and what its other side shall write into it."""
        token, size = secrets.token_bytes(_TOKEN), 2 * self._ring_size + _PAGE
        try:
            fd = os.memfd_create("divisi", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                memory = mmap.mmap(fd, size)
                socket.send_fds(connection, [token], [fd])
            finally:
                os.close(fd)
        except OSError:
            connection.close()
            return None
        return self._segment(library, memory, connection, lower=True), token

    def _take(self, library: Library, connection: socket.socket) -> Segment | None:
        """The segment that the other side offers, once both have seen that it is the same."""
        try:
            token, fds, _, _ = socket.recv_fds(connection, _TOKEN, 1)
            if len(fds) != 1:
                raise OSError("no segment came")
            try:
                memory = mmap.mmap(fds[0], 2 * self._ring_size + _PAGE)
            finally:
                os.close(fds[0])
            memory[-_TOKEN:] = token
            connection.sendall(_YES)
            if connection.recv(1) != _YES:
                raise OSError("the other side does not see the same segment")
        except (OSError, ValueError):  # also a segment of another size
            connection.close()
            return None
        return self._segment(library, memory, connection, lower=False)

    def _segment(self, library: Library, memory: mmap.mmap, connection: socket.socket, *, lower: bool) -> Segment:
        rings = [
            Ring(library, memory, offset, self.largest, connection.fileno(), self.spin_s)
            for offset in (0, self._ring_size)
        ]
        out, into = rings if lower else reversed(rings)
        return Segment(memory, connection, out, into)


def _accept(listener: socket.socket, count: int) -> Mapping[int, socket.socket]:
    """The connections of so many partners, by their ranks; fewer where one went away."""
    connections: dict[int, socket.socket] = {}
    with contextlib.suppress(OSError):
        for _ in range(count):
            connection, _ = listener.accept()
            connection.settimeout(_HANDSHAKE_S)
            connections[int.from_bytes(connection.recv(4), "little")] = connection
    return connections


def _agreed(offer: tuple[Segment, bytes]) -> Segment | None:
    segment, token = offer
    try:
        if segment.connection.recv(1) == _YES and segment.memory[-_TOKEN:] == token:
            segment.connection.sendall(_YES)
            return segment
    except OSError:
        pass
    segment.connection.close()
    return None


class Segment:
    """What two ranks share: a ring for each direction, and the connection by whose end they part."""

    def __init__(self, memory: mmap.mmap, connection: socket.socket, out: Ring, into: Ring) -> None:
        self.memory = memory
        self.connection = connection
        self._out, self._into = out, into
        self._activity = Activity()
        self._unsent: deque[Put] = deque()
        self._closed = False

    def tell(self, activity: Activity) -> Segment:
        """Have each wait for a message noted."""
        self._activity = activity
        return self

    def send(self, data: Tensor, seat: str) -> Put:
        """Copy a message into the ring, or have that done once there is a slot. Raises StepAborted."""
        put = Put(self, data, seat)
        self._unsent.append(put)
        self.flush(0.0, seat)
        return put

    def recv(self, data: Tensor, seat: str) -> Take:
        """The next message, which `wait` copies out of the ring. Take them in the order of these calls."""
        return Take(self, data, seat)

    def flush(self, wait_s: float, seat: str) -> None:
        """Copy what is unsent as far as there are slots, waiting so long for each. Raises StepAborted."""
        while self._unsent:
            data = self._unsent[0].data
            outcome = self._check(self._out.put(data.data_ptr(), data.numel(), wait_s), seat)
            if outcome is Outcome.LATE:
                return
            self._unsent.popleft().done = True

    def take(self, data: Tensor, wait_s: float, seat: str) -> None:
        """Copy the next message. Raises StepAborted."""
        self._activity.waiting()
        if self._check(self._into.take(data.data_ptr(), data.numel(), wait_s), seat) is Outcome.LATE:
            raise StepAborted("did not answer before its deadline", seat)
        self._activity.goes_on()

    def _check(self, outcome: Outcome, seat: str) -> Outcome:
        if outcome is Outcome.GONE or self._closed:
            raise StepAborted("shared memory was closed", seat)
        if outcome is Outcome.TOO_LONG:
            raise StepAborted("a message in shared memory is longer than was agreed", seat)
        return outcome

    def close(self) -> None:
        """Have whoever waits at either end stop; the memory goes with the last who refers to it."""
        if not self._closed:
            self._closed = True
            self._out.close()
            self._into.close()
            self.connection.close()


class Put:
    """A message on its way out."""

    __slots__ = ("_seat", "_segment", "data", "done")

    def __init__(self, segment: Segment, data: Tensor, seat: str) -> None:
        self._segment, self.data, self._seat = segment, data, seat
        self.done = False

    def wait(self, deadline: float) -> None:
        """See Transfer."""
        if not self.done:
            self._segment.flush(_left_s(deadline), self._seat)
        if not self.done:
            raise StepAborted("did not take a message before the deadline", self._seat)


class Take:
    """A message that is waited for."""

    __slots__ = ("_data", "_seat", "_segment")

    def __init__(self, segment: Segment, data: Tensor, seat: str) -> None:
        self._segment, self._data, self._seat = segment, data, seat

    def wait(self, deadline: float) -> None:
        """See Transfer."""
        self._segment.take(self._data, _left_s(deadline), self._seat)


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
