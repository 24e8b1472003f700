"""The mesh over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from divisi.cluster.door import Handshake
from divisi.cluster.errors import EpochEnded, StepAborted
from divisi.cluster.gang.control.agreement import NOTHING, merge
from divisi.cluster.gang.control.header import Announcement, Header
from divisi.cluster.gang.control.mesh import FollowerMesh, LeaderMesh
from divisi.cluster.gang.control.peer import Peer, listen
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.seats import Address, GangShape, Membership, Seat
from tests.cluster.gang.control.passes import draft, full
from tests.support import strangers
from tests.support.credentials import CREDENTIALS


class Gang:
    """One leader and its followers in one process."""

    def __init__(self, shape: GangShape, *absent: int) -> None:
        self.listener = listen("127.0.0.1")
        address = Address("127.0.0.1", self.listener.getsockname()[1])
        nobody = frozenset(Seat("attention", index) for index in absent)
        holders = tuple(str(seat) for seat in shape.seats if seat not in nobody)
        size = len(holders)
        self.membership = Membership(4, shape, holders, (address,) * size, address, nobody)
        self.inboxes = [EpochInbox() for _ in range(size)]
        deadline = time.monotonic() + 10
        with ThreadPoolExecutor() as pool:
            secret = CREDENTIALS.secret
            leader = pool.submit(LeaderMesh, self.listener, self.membership, self.inboxes[0], deadline, secret)
            self.followers = {
                rank: FollowerMesh(self.membership, rank, self.inboxes[rank], deadline, secret)
                for rank in range(1, size)
            }
            self.leader = leader.result()

    def close(self) -> None:
        for mesh in (self.leader, *self.followers.values()):
            mesh.close()
        self.listener.close()
        for inbox in self.inboxes:
            inbox.wake.close()


@pytest.fixture
def gang() -> Iterator[Gang]:
    gang = Gang(GangShape(2, 1))
    yield gang
    gang.close()


def begin(leader: LeaderMesh, deadline_s: float = 5.0) -> Header:
    while (header := leader.next_step(deadline_s)) is None:
        pass
    return header


def test_a_step_begins_with_the_same_header_everywhere(gang: Gang) -> None:
    for step in range(1, 50):
        gang.followers[1].announce((1,) * (step % 4) + (step,))
        gang.leader.announce((3,))
        header = begin(gang.leader)
        assert (header.step, header.epoch) == (step, 4)
        assert header.passes == (*[draft({1: 1})] * (step % 4), *full({0: 3, 1: step}))
        assert gang.followers[1].next_step(5.0) == header
        assert gang.followers[2].next_step(5.0) == header


def test_an_idle_worker_rings_a_parked_leader(gang: Gang) -> None:
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    with ThreadPoolExecutor() as pool:
        header = pool.submit(begin, gang.leader)
        assert gang.inboxes[0].wake.fileno() >= 0
        gang.followers[1].announce((2,))
        assert header.result(timeout=5).passes == full({1: 2})


@pytest.mark.parametrize("counts", [(7,), (2, 1, 7)], ids=str)
def test_rows_that_cross_a_header_are_announced_again(gang: Gang, counts: tuple[int, ...]) -> None:
    gang.followers[1].announce(NOTHING)
    gang.leader.announce((3,))
    assert begin(gang.leader).passes == full({0: 3})
    gang.followers[1].announce(counts)  # sent before its side has read the header
    crossed = gang.followers[1].next_step(5.0)
    assert crossed is not None
    assert crossed.passes == full({0: 3})
    gang.followers[1].announce(counts)
    gang.leader.announce((1,))
    deadline = time.monotonic() + 5
    while (passes := begin(gang.leader).passes) == full({0: 1}):  # the leader is always busy, and still reads the ring
        assert time.monotonic() < deadline
        gang.leader.announce((1,))
    assert passes == merge({0: (1,), 1: counts})


def test_late_and_stale_announcements_are_dropped(gang: Gang) -> None:
    """Of an earlier step, of another epoch: the sender's own next announcement is waited for."""
    peer = gang.followers[1]._leader
    peer.send(Announcement(3, 1, (9,)).encode())
    peer.send(Announcement(4, 0, (9,)).encode())
    peer.send(Announcement(4, 2, (9,)).encode())
    gang.leader.announce((1,))
    with pytest.raises(StepAborted, match="attention:1: did not answer"):
        begin(gang.leader, 0.2)


def test_a_shard_that_announces_rows_ends_the_epoch(gang: Gang) -> None:
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    gang.followers[2].announce((1,))
    with pytest.raises(StepAborted, match="expert:0: announced rows"):
        begin(gang.leader)


def test_a_silent_worker_passes_its_deadline_and_is_named(gang: Gang) -> None:
    gang.leader.announce((1,))
    begin_at = time.monotonic()
    with pytest.raises(StepAborted, match="attention:1"):
        gang.leader.next_step(0.2)
    assert time.monotonic() - begin_at < 2


def test_a_closed_connection_ends_parked_waits(gang: Gang) -> None:
    gang.followers[2].close()
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    with pytest.raises(StepAborted, match="expert:0"):
        begin(gang.leader)
    gang.leader.close()
    with pytest.raises(StepAborted, match="attention:0"):
        gang.followers[1].next_step(5.0)


def test_those_who_are_there_go_by_their_seats() -> None:
    gang = Gang(GangShape(4, 1), 0, 2)
    assert (gang.membership.workers, gang.membership.shards) == ({1: 0, 3: 1}, {0: 2})
    gang.leader.announce((3,))
    gang.followers[1].announce((2, 5))
    header = begin(gang.leader)
    assert header.passes == (draft({3: 2}), *full({1: 3, 3: 5}))
    assert gang.followers[1].next_step(5.0) == gang.followers[2].next_step(5.0) == header
    gang.leader.announce(NOTHING)
    with pytest.raises(StepAborted, match="attention:3: did not answer"):
        begin(gang.leader, 0.2)
    gang.close()


def test_an_epoch_ends_between_two_steps(gang: Gang) -> None:
    gang.leader.announce((3,))
    gang.followers[1].announce((2,))
    header = begin(gang.leader)
    for mesh in (gang.followers[1], gang.followers[2]):
        assert mesh.next_step(5.0) == header
    gang.inboxes[0].change(3)  # an older epoch: nothing happens
    gang.inboxes[0].change(4)
    gang.leader.announce((1,))
    with pytest.raises(StepAborted, match="attention:1: did not answer") as ended:
        begin(gang.leader, 0.2)
    assert not isinstance(ended.value, EpochEnded), "it is in a step"
    gang.leader._deadline = None
    gang.followers[1].announce((1,))
    with pytest.raises(EpochEnded):
        begin(gang.leader)
    gang.leader.close()
    for mesh in (gang.followers[1], gang.followers[2]):
        with pytest.raises(EpochEnded) as ended:
            mesh.next_step(5.0)
        assert ended.value.seat is None, "nobody is blamed"


def test_who_announces_to_a_leader_that_has_ended_the_epoch_blames_nobody(gang: Gang) -> None:
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    gang.inboxes[0].change(4)
    with pytest.raises(EpochEnded):
        begin(gang.leader)
    gang.leader.close()

    def announce() -> None:
        for rows in range(1, 100):
            gang.followers[1].announce((rows,))

    with pytest.raises(EpochEnded) as ended:
        announce()
    assert ended.value.seat is None


def test_a_parked_leader_ends_the_epoch_when_asked(gang: Gang) -> None:
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(begin, gang.leader)
        threading.Timer(0.05, gang.inboxes[0].change, [4]).start()
        with pytest.raises(EpochEnded):
            waiting.result(timeout=5)
    with pytest.raises(EpochEnded):
        gang.followers[2].next_step(5.0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_interrupt_ends_a_parked_wait(gang: Gang, rank: int) -> None:
    gang.leader.announce(NOTHING)
    gang.followers[1].announce(NOTHING)
    mesh = gang.leader if rank == 0 else gang.followers[rank]

    def wait() -> None:
        while True:
            mesh.next_step(5.0)

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait)
        gang.inboxes[rank].interrupt(3)  # an older epoch: nothing happens
        threading.Timer(0.05, gang.inboxes[rank].interrupt, [4]).start()
        with pytest.raises(StepAborted, match="epoch 4 is over"):
            waiting.result(timeout=5)


def test_leftovers_of_older_epochs_are_not_let_in() -> None:
    listener = listen("127.0.0.1")
    address = Address("127.0.0.1", listener.getsockname()[1])
    shape = GangShape(1, 1)
    old, new = (Membership(epoch, shape, ("a", "b"), (address,) * 2, address) for epoch in (1, 2))
    inbox, deadline = EpochInbox(), time.monotonic() + 10
    secret = CREDENTIALS.secret
    with ThreadPoolExecutor(3) as pool:
        stale = pool.submit(FollowerMesh, old, 1, EpochInbox(), deadline, secret)
        time.sleep(0.1)  # it is to be the first in the backlog; the other way around, the test shows less
        fresh = pool.submit(FollowerMesh, new, 1, EpochInbox(), deadline, secret)
        leader = LeaderMesh(listener, new, inbox, deadline, secret)
        leader.announce((1,))
        header = begin(leader)
        assert fresh.result().next_step(5.0) == header
        with pytest.raises(StepAborted):
            stale.result().next_step(5.0)
    for mesh in (leader, fresh.result()):
        mesh.close()
    listener.close()


def test_strangers_on_the_listener_are_sent_away_and_no_step_is_aborted(caplog: pytest.LogCaptureFixture) -> None:
    listener = listen("127.0.0.1")
    address = Address("127.0.0.1", listener.getsockname()[1])
    membership = Membership(1, GangShape(1, 1), ("a", "b"), (address,) * 2, address)
    inbox, deadline = EpochInbox(), time.monotonic() + 10
    recorded = _recorded_hello(listener, address)
    hung_up = strangers.silent(address)
    hung_up.close()
    scanner = strangers.silent(address)
    scanner.sendall(b"GET / HTTP/1.1\r\nHost: divisi\r\n\r\n")
    with ThreadPoolExecutor(4) as pool:
        noise = pool.submit(strangers.with_noise, address)
        other = pool.submit(strangers.with_another_secret, address)
        replayed = pool.submit(strangers.with_a_recorded_hello, address, recorded)
        follower = pool.submit(FollowerMesh, membership, 1, EpochInbox(), deadline, CREDENTIALS.secret)
        time.sleep(0.2)  # all of them are to be in the backlog; some come later otherwise, and the test shows less
        leader = LeaderMesh(listener, membership, inbox, deadline, CREDENTIALS.secret)
        callers = [scanner, noise.result(), other.result(), replayed.result()]
        late = [strangers.silent(address), strangers.with_noise(address, 1000)]
        for _ in range(3):
            leader.announce((1,))
            assert begin(leader) == follower.result().next_step(5.0)
    assert all(strangers.is_closed(caller) for caller in callers)
    lines = [record.getMessage() for record in caplog.records if "refused a connection" in record.getMessage()]
    assert any("does not know this gang's secret" in line for line in lines), lines
    assert any("is no process of Divisi" in line for line in lines), lines
    for end in (leader, follower.result(), listener, *callers, *late, inbox.wake):
        end.close()


def _recorded_hello(listener: socket.socket, address: Address) -> bytes:
    """What a peer of an earlier epoch has sent to this listener."""
    with ThreadPoolExecutor(1) as pool:
        recording = pool.submit(strangers.recorded_by, address, CREDENTIALS.secret)
        listener.setblocking(True)
        peer = Peer(listener.accept()[0], 5.0, Handshake(CREDENTIALS.secret, "server"))
        listener.setblocking(False)
        while not recording.done():
            with contextlib.suppress(StepAborted):
                peer.receive()
        peer.close()
        return recording.result()
