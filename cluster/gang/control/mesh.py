"""The control mesh: one TCP connection from every rank to the lowest attention worker, for headers and announcements.

Every wait is either parked (`deadline` None: until a message or a wake-up comes, however long) or bound by a deadline
in `time.monotonic()` seconds. A closed connection, a deadline that passes and an interrupted epoch raise StepAborted.
Messages of another epoch, and announcements for a step that has already begun, are dropped. Imports no torch.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from divisi.cluster.door import MAX_STRANGERS, Handshake, HandshakeFailed, Refusals, Secret
from divisi.cluster.errors import EpochEnded, StepAborted
from divisi.cluster.gang.control.agreement import StepAgreement
from divisi.cluster.gang.control.header import Announcement, Beat, End, Header, Hello, Message
from divisi.cluster.gang.control.peer import Peer, look, wait_for
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.seats import Membership, Seat

CHANGES = "its membership changes"


class LeaderMesh:
    """The leader's end: collects announcements, sends headers. With a gang of one it has no connection at all."""

    def __init__(
        self,
        listener: socket.socket,
        membership: Membership,
        inbox: EpochInbox,
        deadline: float,
        secret: Secret,
        mark: Callable[[], bytes] = bytes,
    ) -> None:
        """Wait until every other rank has said hello. `mark` gives what a header carries for observers.

        Who does not know the secret is sent away, with a line in the log.

        Raises StepAborted.
        """
        self._membership = membership
        self._inbox = inbox
        self._mark = mark
        self._secret = secret
        self._refusals = Refusals(f"of the control mesh of epoch {membership.epoch}")
        self._step = 0
        self._agreement = StepAgreement(membership.workers)
        self._deadline: float | None = None
        """Of the announcements owed now; a wake-up in between doesn't prolong it."""
        self._peers: dict[Seat, Peer] = {}
        self.beats: dict[Seat, Peer] = {}
        """Each rank's second connection, for its beats; to be closed by who takes them."""
        try:
            self._accept_all(listener, deadline)
        except StepAborted:
            self.close()
            for peer in self.beats.values():
                peer.close()
            raise

    def announce(self, counts: tuple[int, ...], alone: bool = False, second: int = 0) -> None:
        """Note the leader's own rows by pass for the next step, none where it has nothing to do.

        `alone`: they are to have a step for themselves; `second`: so many of the last pass's are a second micro-batch.
        """
        self._agreement.announce(self._membership.seats[0].index, counts, alone, second)

    def next_step(self, deadline_s: float) -> Header | None:
        """Begin the next step on all ranks once its workers are known; None when woken for another reason.

        Bound by `deadline_s` while a worker still owes an announcement, else parked until one has rows.
        """
        self._inbox.activity.waiting()
        # Look first: an idle worker that rings must get into the next step even if there is always one to begin.
        peers, woken = look(list(self._peers.values()), self._inbox, self._membership.epoch, 0.0)
        self._read_announcements(peers)
        self._end_if_asked()
        passes = self._agreement.begin()
        if passes is None and not woken:
            if self._deadline is None and self._agreement.unfinished:
                self._deadline = time.monotonic() + deadline_s
            self._collect(self._deadline if self._agreement.unfinished else None)
            self._end_if_asked()
            passes = self._agreement.begin()
        if passes is None:
            return None
        self._step += 1
        self._deadline = None
        header = Header(self._membership.epoch, self._step, passes, self._mark())
        data = header.encode()
        for peer in self._peers.values():
            peer.send(data)
        self._inbox.activity.goes_on()
        return header

    def _end_if_asked(self) -> None:
        """End the epoch where it is to change and nobody is in a step. Raises EpochEnded then."""
        epoch = self._membership.epoch
        if self._inbox.is_changing(epoch) and not self._agreement.unfinished:
            for peer in self._peers.values():
                peer.send(End(epoch).encode())
            raise EpochEnded(CHANGES)

    def close(self) -> None:
        """Drop all connections, which tells the other ranks that the epoch is over."""
        for peer in self._peers.values():
            peer.close()

    def _collect(self, deadline: float | None) -> None:
        """Take announcements until something arrived or the loop was woken."""
        peers, epoch = list(self._peers.values()), self._membership.epoch
        self._read_announcements(wait_for(peers, self._inbox, epoch, deadline, self._waiting_for()))

    def _read_announcements(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            self._take(peer, peer.receive())

    def _take(self, peer: Peer, messages: Sequence[Message]) -> None:
        now = self._membership.epoch, self._step + 1
        for message in messages:
            if isinstance(message, Announcement) and (message.epoch, message.step) == now:
                if peer.seat is None or peer.seat.role != "attention":
                    raise StepAborted("announced rows and is no attention worker", peer.who)
                self._agreement.announce(peer.seat.index, message.counts, message.alone, message.second)

    def _waiting_for(self) -> str:
        return ", ".join(str(Seat("attention", worker)) for worker in self._agreement.unfinished)

    def _accept_all(self, listener: socket.socket, deadline: float) -> None:
        """Every rank but the leader connects twice; connections left over from older epochs are closed."""
        unknown: list[Peer] = []
        others, unheard_s = self._membership.seats[1:], self._membership.patience.suspect_after_s
        try:
            while absent := [seat for seat in others if seat not in self._peers or seat not in self.beats]:
                sources: list[socket.socket | Peer] = [listener, *unknown]
                missing = ", ".join(map(str, absent))
                for ready in wait_for(sources, self._inbox, self._membership.epoch, deadline, missing):
                    if isinstance(ready, Peer):
                        if self._greet(ready):
                            unknown.remove(ready)
                        continue
                    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it hung up meanwhile
                        unknown.append(Peer(listener.accept()[0], unheard_s, Handshake(self._secret, "server")))
                    if len(unknown) > MAX_STRANGERS + 2 * len(others):
                        unknown.pop(0).close()
                        self._refusals.note("crowded", "too many others wait")
        finally:
            for peer in unknown:
                if not peer.is_inside:
                    self._refusals.note("slow", "it did not prove in time to know the secret")
                peer.close()

    def _greet(self, peer: Peer) -> bool:
        """Whether it is decided what the connection is for."""
        try:
            messages = peer.receive()
        except HandshakeFailed as error:
            self._refusals.note(error.kind, f"its other side {error}")
            peer.close()
            return True
        except StepAborted:  # a rank that gave up an older epoch while it waited in the backlog, or a port scanner
            peer.close()
            return True
        if not messages:
            return False
        others = self._membership.seats[1:]
        match messages:
            case [Hello(epoch, seat), *early] if (
                epoch == self._membership.epoch and seat in others and seat not in self._peers
            ):
                peer.seat = seat
                self._peers[seat] = peer
                self._take(peer, early)
            case [Beat(epoch, seat), *_] if (
                epoch == self._membership.epoch and seat in others and seat not in self.beats
            ):
                peer.seat = seat
                self.beats[seat] = peer
            case _:
                peer.close()
        return True


class FollowerMesh:
    """The end of every rank but the leader: announces rows (workers), receives headers."""

    def __init__(self, membership: Membership, rank: int, inbox: EpochInbox, deadline: float, secret: Secret) -> None:
        """Connect to the leader, and once more for the beats. Raises StepAborted."""
        self._epoch = membership.epoch
        self._seat = membership.seats[rank]
        self._inbox = inbox
        self._step = 0
        self._announced: tuple[int, ...] | None = None
        self._deadline: float | None = None
        self._arrived: list[Header | End] = []
        self._leader = _connect(membership, inbox, deadline, secret)
        self._activity = inbox.activity
        self.beats: dict[Seat, Peer] = {}
        """A second connection to the leader, for the beats; to be closed by who takes it."""
        try:
            self._leader.send(Hello(self._epoch, self._seat).encode())
            beats = self.beats[membership.seats[0]] = _connect(membership, inbox, deadline, secret)
            beats.send(Beat(self._epoch, self._seat, 0, False).encode())
        except StepAborted:
            self.close()
            for peer in self.beats.values():
                peer.close()
            raise

    def announce(self, counts: tuple[int, ...], alone: bool = False, second: int = 0) -> None:
        """Tell the leader this worker's rows by pass for the next step, none where it has nothing to do.

        `alone`, `second`: as the leader's. Rings a leader that is parked.
        """
        if counts == self._announced:
            return
        try:
            self._leader.send(Announcement(self._epoch, self._step + 1, counts, alone, second).encode())
        except StepAborted:
            with contextlib.suppress(StepAborted):
                self._read([self._leader])
            if any(isinstance(message, End) for message in self._arrived):
                raise EpochEnded(CHANGES) from None  # the leader has closed the connection in good order
            raise
        self._announced = counts

    def next_step(self, deadline_s: float) -> Header | None:
        """The next step's header; None when woken for another reason.

        Bound by `deadline_s` after rows were announced, else parked. Shards never announce.
        """
        self._activity.waiting()
        if not self._arrived:
            if not self._announced:
                self._deadline = None
            elif self._deadline is None:
                self._deadline = time.monotonic() + deadline_s
            self._read(wait_for([self._leader], self._inbox, self._epoch, self._deadline, self._leader.who))
        if not self._arrived:
            return None
        header = self._arrived.pop(0)
        if isinstance(header, End):
            raise EpochEnded(CHANGES)
        self._step = header.step
        self._deadline = None
        takes_part = self._seat.role == "attention" and header.includes(self._seat.index)
        if takes_part or self._announced:
            # Rows announced but not in the header: they crossed it on the way and have to be announced again.
            self._announced = None
        self._activity.goes_on()
        return header

    def _read(self, peers: Sequence[Peer]) -> None:
        for peer in peers:
            self._arrived += [m for m in peer.receive() if isinstance(m, Header | End) and m.epoch == self._epoch]

    def headers(self) -> Iterator[Header]:
        """For a shard: the headers of all steps of the epoch, parked in between. Ends by StepAborted."""
        while True:
            if (header := self.next_step(0.0)) is not None:
                yield header

    def close(self) -> None:
        """Drop the connection, which tells the leader that this rank has left the epoch."""
        self._leader.close()


def _connect(membership: Membership, inbox: EpochInbox, deadline: float, secret: Secret) -> Peer:
    """Inside once the leader has let it in, which may be after it has left its last epoch."""
    leader, seat, left_s = membership.leader, membership.seats[0], max(deadline - time.monotonic(), 0.01)
    try:
        connection = socket.create_connection((leader.host, leader.port), timeout=left_s)
    except OSError as error:
        raise StepAborted(f"cannot reach the leader at {leader.host}:{leader.port}: {error}", str(seat)) from error
    peer = Peer(connection, membership.patience.suspect_after_s, Handshake(secret, "client"), seat)
    try:
        while not peer.is_inside:
            if wait_for([peer], inbox, membership.epoch, deadline, peer.who):
                peer.receive()
    except HandshakeFailed as error:
        peer.close()
        raise StepAborted(f"the leader at {leader.host}:{leader.port} {error}", str(seat)) from error
    except StepAborted:
        peer.close()
        raise
    return peer
