"""Frames, the leader's agreement, and the mesh over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.agreement import StepAgreement
from divisi.cluster.gang.header import Frame, FrameReader, Kind
from divisi.cluster.gang.inbox import EpochInbox
from divisi.cluster.gang.mesh import FollowerMesh, LeaderMesh, listen
from divisi.cluster.seats import Address, GangShape, Membership


def test_frames_survive_any_cutting() -> None:
    frames = [
        Frame(Kind.HELLO, 3, 2**32 - 1, 0),
        Frame(Kind.PLAN, 1, 7, 2**63, (512,)),
        Frame(Kind.HEADER, 0, 7, 9, (0, 1, 2**32 - 1)),
    ]
    data = b"".join(frame.encode() for frame in frames)
    for size in (1, 3, 17, len(data)):
        reader = FrameReader()
        got = [frame for i in range(0, len(data), size) for frame in reader.feed(data[i : i + size])]
        assert got == frames
    with pytest.raises(ValueError, match="255"):
        FrameReader().feed(b"\xff" * 40)


def test_agreement_waits_for_those_that_run_and_not_for_the_idle() -> None:
    agreement = StepAgreement(3)
    assert agreement.unfinished == (0, 1, 2)
    for worker in range(3):
        agreement.announce(worker, 0)
    assert agreement.begin() is None
    assert agreement.unfinished == (), "all idle: nothing to wait for but a ring"
    agreement.announce(1, 5)
    assert agreement.begin() == (0, 5, 0)
    assert agreement.unfinished == (1,)
    agreement.announce(0, 2)
    assert agreement.begin() is None, "worker 1 is still in the step"
    agreement.announce(1, 0)
    assert agreement.begin() == (2, 0, 0)


class Gang:
    """One leader and its followers in one process."""

    def __init__(self, shape: GangShape) -> None:
        self.listener = listen("127.0.0.1")
        address = Address("127.0.0.1", self.listener.getsockname()[1])
        holders = tuple(str(seat) for seat in shape.seats)
        self.membership = Membership(4, shape, holders, (address,) * shape.size, address)
        self.inboxes = [EpochInbox() for _ in range(shape.size)]
        deadline = time.monotonic() + 10
        with ThreadPoolExecutor() as pool:
            leader = pool.submit(LeaderMesh, self.listener, self.membership, self.inboxes[0], deadline)
            self.followers = {
                rank: FollowerMesh(self.membership, rank, self.inboxes[rank], deadline) for rank in range(1, shape.size)
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


def begin(leader: LeaderMesh) -> Frame:
    while (header := leader.next_step(5.0)) is None:
        pass
    return header


def test_a_step_begins_with_the_same_header_everywhere(gang: Gang) -> None:
    for step in range(1, 50):
        gang.followers[1].announce(step)
        gang.leader.announce(3)
        header = begin(gang.leader)
        assert (header.step, header.epoch, header.counts) == (step, 4, (3, step))
        assert gang.followers[1].next_step(5.0) == header
        assert gang.followers[2].next_step(5.0) == header


def test_an_idle_worker_rings_a_parked_leader(gang: Gang) -> None:
    gang.leader.announce(0)
    gang.followers[1].announce(0)
    with ThreadPoolExecutor() as pool:
        header = pool.submit(begin, gang.leader)
        assert gang.inboxes[0].wake.fileno() >= 0
        gang.followers[1].announce(2)
        assert header.result(timeout=5).counts == (0, 2)


def test_tokens_that_cross_a_header_are_announced_again(gang: Gang) -> None:
    gang.followers[1].announce(0)
    gang.leader.announce(3)
    assert begin(gang.leader).counts == (3, 0)
    gang.followers[1].announce(7)  # sent before its side has read the header
    crossed = gang.followers[1].next_step(5.0)
    assert crossed is not None
    assert crossed.counts == (3, 0)
    gang.followers[1].announce(7)
    gang.leader.announce(1)
    deadline = time.monotonic() + 5
    while (counts := begin(gang.leader).counts) == (1, 0):  # the leader is always busy, and still reads the ring
        assert time.monotonic() < deadline
        gang.leader.announce(1)
    assert counts == (1, 7)


def test_a_silent_worker_passes_its_deadline_and_is_named(gang: Gang) -> None:
    gang.leader.announce(1)
    begin_at = time.monotonic()
    with pytest.raises(StepAborted, match="attention:1"):
        gang.leader.next_step(0.2)
    assert time.monotonic() - begin_at < 2


def test_a_closed_connection_ends_parked_waits(gang: Gang) -> None:
    gang.followers[2].close()
    gang.leader.announce(0)
    gang.followers[1].announce(0)
    with pytest.raises(StepAborted, match="expert:0"):
        begin(gang.leader)
    gang.leader.close()
    with pytest.raises(StepAborted, match="attention:0"):
        gang.followers[1].next_step(5.0)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_interrupt_ends_a_parked_wait(gang: Gang, rank: int) -> None:
    gang.leader.announce(0)
    gang.followers[1].announce(0)
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
    stale = FollowerMesh(old, 1, inbox, deadline)
    fresh = FollowerMesh(new, 1, inbox, deadline)
    leader = LeaderMesh(listener, new, inbox, deadline)
    leader.announce(1)
    header = begin(leader)
    assert fresh.next_step(5.0) == header
    with pytest.raises(StepAborted):
        stale.next_step(5.0)
    for mesh in (leader, fresh, stale):
        mesh.close()
    listener.close()


def test_strangers_on_the_listener_are_sent_away() -> None:
    listener = listen("127.0.0.1")
    address = Address("127.0.0.1", listener.getsockname()[1])
    membership = Membership(1, GangShape(1, 1), ("a", "b"), (address,) * 2, address)
    inbox, deadline = EpochInbox(), time.monotonic() + 10
    strangers = [socket.create_connection((address.host, address.port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\nHost: divisi\r\n\r\n")
    strangers[1].sendall(Frame(Kind.HELLO, 9, 1, 0).encode())  # no such rank
    strangers[2].close()
    follower = FollowerMesh(membership, 1, inbox, deadline)
    leader = LeaderMesh(listener, membership, inbox, deadline)
    leader.announce(1)
    assert begin(leader) == follower.next_step(5.0)
    for end in (leader, follower, listener, *strangers, inbox.wake):
        end.close()
