"""The control mesh: one TCP connection from every rank to `attention:0`, for headers and announcements.

Every wait is either parked (`deadline` None: until a frame or a wake-up comes, however long) or bound by a deadline
in `time.monotonic()` seconds. A closed connection, a deadline that passes and an interrupted epoch raise StepAborted.
Frames of another epoch, and announcements for a step that has already begun, are dropped. Imports no torch.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.agreement import StepAgreement
from divisi.cluster.gang.header import Frame, FrameReader, Kind
from divisi.cluster.gang.inbox import EpochInbox
from divisi.cluster.seats import Address, Membership

_CHUNK = 65536


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


class _Peer:
    """One connection, tuned for small frames."""

    def __init__(self, connection: socket.socket, seat: str) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._reader = FrameReader()
        self.seat = seat

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: Frame) -> None:
        """Frames are far smaller than a socket's buffer: one that doesn't fit has a peer that is stuck."""
        data = frame.encode()
        try:
            sent = self._socket.send(data)
        except OSError as error:
            raise StepAborted(f"control connection failed: {error}", self.seat) from error
        if sent != len(data):
            raise StepAborted("control connection is stuck", self.seat)

    def receive(self) -> list[Frame]:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise StepAborted(f"control connection failed: {error}", self.seat) from error
        if not data:
            raise StepAborted("control connection was closed", self.seat)
        try:
            return self._reader.feed(data)
        except ValueError as error:
            raise StepAborted(f"control connection carries something else: {error}", self.seat) from error

    def close(self) -> None:
        self._socket.close()


Source = TypeVar("Source", bound="HasFd")


class LeaderMesh:
    """The leader's end: collects announcements, sends headers. With a gang of one it has no connection at all."""

    def __init__(self, listener: socket.socket, membership: Membership, inbox: EpochInbox, deadline: float) -> None:
        """Wait until every other rank has said hello. Raises StepAborted."""
        self._membership = membership
        self._inbox = inbox
        self._step = 0
        self._agreement = StepAgreement(membership.shape.attention_workers)
        self._deadline: float | None = None
        """Of the announcements owed now; a wake-up in between doesn't prolong it."""
        self._peers: dict[int, _Peer] = {}
        try:
            self._accept_all(listener, deadline)
        except StepAborted:
            self.close()
            raise

    def announce(self, num_tokens: int) -> None:
        """Note the leader's own token count for the next step."""
        self._agreement.announce(0, num_tokens)

    def next_step(self, deadline_s: float) -> Frame | None:
        """Begin the next step on all ranks once its workers are known; None when woken for another reason.

        Bound by `deadline_s` while a worker still owes an announcement, else parked until one has tokens.
        """
        # Look first: an idle worker that rings must get into the next step even if there is always one to begin.
        peers, woken = _ready(list(self._peers.values()), self._inbox, self._membership.epoch, 0.0)
        self._read_announcements(peers)
        counts = self._agreement.begin()
        if counts is None and not woken:
            if self._deadline is None and self._agreement.unfinished:
                self._deadline = time.monotonic() + deadline_s
            self._collect(self._deadline if self._agreement.unfinished else None)
            counts = self._agreement.begin()
        if counts is None:
            return None
        self._step += 1
        self._deadline = None
        header = Frame(Kind.HEADER, 0, self._membership.epoch, self._step, counts)
        for peer in self._peers.values():
            peer.send(header)
        return header

    def close(self) -> None:
        """Drop all connections, which tells the other ranks that the epoch is over."""
        for peer in self._peers.values():
            peer.close()

    def _collect(self, deadline: float | None) -> None:
        """Take announcements until something arrived or the loop was woken."""
        peers, epoch = list(self._peers.values()), self._membership.epoch
        self._read_announcements(_wait(peers, self._inbox, epoch, deadline, self._waiting_for()))

    def _read_announcements(self, peers: Sequence[_Peer]) -> None:
        for peer in peers:
            for frame in peer.receive():
                if frame.kind is Kind.PLAN and frame.epoch == self._membership.epoch and frame.step == self._step + 1:
                    self._agreement.announce(frame.sender, frame.counts[0])

    def _waiting_for(self) -> str:
        return ", ".join(str(self._membership.shape.seat(worker)) for worker in self._agreement.unfinished)

    def _accept_all(self, listener: socket.socket, deadline: float) -> None:
        """Every rank but the leader connects; connections left over from older epochs are closed."""
        unknown: list[_Peer] = []
        shape = self._membership.shape
        try:
            while len(self._peers) < shape.size - 1:
                sources: list[socket.socket | _Peer] = [listener, *unknown]
                missing = ", ".join(str(shape.seat(r)) for r in range(1, shape.size) if r not in self._peers)
                for ready in _wait(sources, self._inbox, self._membership.epoch, deadline, missing):
                    if isinstance(ready, _Peer):
                        unknown.remove(ready)
                        self._greet(ready)
                        continue
                    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it hung up meanwhile
                        unknown.append(_Peer(listener.accept()[0], "a rank that said no hello"))
        finally:
            for peer in unknown:
                peer.close()

    def _greet(self, peer: _Peer) -> None:
        try:
            frames = peer.receive()
        except StepAborted:  # a rank that gave up an older epoch while it waited in the backlog, or a port scanner
            peer.close()
            return
        for frame in frames[:1]:
            known = 0 < frame.sender < self._membership.shape.size
            if known and frame.kind is Kind.HELLO and frame.epoch == self._membership.epoch:
                peer.seat = str(self._membership.shape.seat(frame.sender))
                self._peers[frame.sender] = peer
                for early in frames[1:]:
                    self._agreement.announce(early.sender, early.counts[0])
                return
        peer.close()


class FollowerMesh:
    """The end of every rank but the leader: announces plans (workers), receives headers."""

    def __init__(self, membership: Membership, rank: int, inbox: EpochInbox, deadline: float) -> None:
        """Connect to the leader and say hello. Raises StepAborted."""
        self._epoch = membership.epoch
        self._rank = rank
        self._inbox = inbox
        self._step = 0
        self._announced: int | None = None
        self._deadline: float | None = None
        self._arrived: list[Frame] = []
        self._leader = _connect(membership.leader, deadline)
        self._send(Frame(Kind.HELLO, rank, self._epoch, 0))

    def announce(self, num_tokens: int) -> None:
        """Tell the leader how many tokens this worker has for the next step; rings it if it is parked."""
        if num_tokens != self._announced:
            self._send(Frame(Kind.PLAN, self._rank, self._epoch, self._step + 1, (num_tokens,)))
            self._announced = num_tokens

    def next_step(self, deadline_s: float) -> Frame | None:
        """The next step's header; None when woken for another reason.

        Bound by `deadline_s` after tokens were announced, else parked. Shards never announce.
        """
        if not self._arrived:
            if not self._announced:
                self._deadline = None
            elif self._deadline is None:
                self._deadline = time.monotonic() + deadline_s
            for peer in _wait([self._leader], self._inbox, self._epoch, self._deadline, self._leader.seat):
                self._arrived += [f for f in peer.receive() if f.kind is Kind.HEADER and f.epoch == self._epoch]
        if not self._arrived:
            return None
        header = self._arrived.pop(0)
        self._step = header.step
        self._deadline = None
        took_part = self._rank < len(header.counts) and header.counts[self._rank] > 0
        if took_part or self._announced:
            # Tokens announced but not in the header: they crossed it on the way and have to be announced again.
            self._announced = None
        return header

    def headers(self) -> Iterator[Frame]:
        """For a shard: the headers of all steps of the epoch, parked in between. Ends by StepAborted."""
        while True:
            if (header := self.next_step(0.0)) is not None:
                yield header

    def close(self) -> None:
        """Drop the connection, which tells the leader that this rank has left the epoch."""
        self._leader.close()

    def _send(self, frame: Frame) -> None:
        self._leader.send(frame)


def _connect(leader: Address, deadline: float) -> _Peer:
    left_s = max(deadline - time.monotonic(), 0.01)
    try:
        return _Peer(socket.create_connection((leader.host, leader.port), timeout=left_s), "attention:0")
    except OSError as error:
        raise StepAborted(f"cannot reach the leader at {leader.host}:{leader.port}: {error}", "attention:0") from error


def _wait(
    sources: Sequence[Source], inbox: EpochInbox, epoch: int, deadline: float | None, waiting_for: str
) -> list[Source]:
    """Sources that can be read; empty after a wake-up. Raises StepAborted on a deadline or at the epoch's end."""
    left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
    ready, woken = _ready(sources, inbox, epoch, left_s)
    if not ready and not woken:
        raise StepAborted("did not answer before its deadline", waiting_for)
    return ready


def _ready(
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
