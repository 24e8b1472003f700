"""Messages, the leader's agreement, and the mesh over real sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from divisi.cluster.door import Handshake
from divisi.cluster.errors import EpochEnded, StepAborted
from divisi.cluster.gang.control.agreement import NOTHING, StepAgreement, merge
from divisi.cluster.gang.control.header import Announcement, End, Header, Hello, Message, MessageReader
from divisi.cluster.gang.control.mesh import FollowerMesh, LeaderMesh
from divisi.cluster.gang.control.peer import Peer, listen
from divisi.cluster.gang.loops.inbox import EpochInbox
from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Address, GangShape, Membership, Seat
from tests.support import strangers
from tests.support.credentials import CREDENTIALS


def full(counts: dict[int, int]) -> tuple[Pass, ...]:
    return (Pass(PassKind.FULL, counts),)


def draft(counts: dict[int, int]) -> Pass:
    return Pass(PassKind.DRAFT, counts)


MESSAGES: list[Message] = [
    Hello(2**32 - 1, Seat("expert", 3)),
    Announcement(7, 2**63, (2, 1, 512)),
    Announcement(7, 2**64 - 1, NOTHING),
    Announcement(7, 4, (2, 9), second=5),
    Header(7, 9, (draft({1: 2**32 - 1}), *full({0: 1, 2**16 - 1: 5}))),
    Header(7, 9, (draft({}), Pass(PassKind.FULL, {2: 1, 3: 8}, {3: 5}, bucket=64)), trace=b"\0trace" * 4),
    Header(0, 0, full({worker: worker + 1 for worker in range(500)})),
    End(2**32 - 1),
]


def test_messages_survive_any_cutting() -> None:
    data = b"".join(message.encode() for message in MESSAGES)
    for size in (1, 3, 17, len(data)):
        reader = MessageReader()
        got = [message for i in range(0, len(data), size) for message in reader.feed(data[i : i + size])]
        assert got == MESSAGES


def test_a_seat_without_rows_takes_no_room_in_a_header() -> None:
    assert Header(1, 2, full({0: 3, 1: 0})).encode() == Header(1, 2, full({0: 3})).encode()


def raw(kind: int, body: bytes, length: int | None = None) -> bytes:
    """A message of step 0 in epoch 0, of any content."""
    return struct.pack("<BHIQ", kind, len(body) if length is None else length, 0, 0) + body


def raw_header(passes: bytes, num_passes: int = 1) -> bytes:
    return raw(3, bytes([num_passes, 0]) + passes)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff" * 40, "no message of kind 255"),
        (b"GET / HTTP/1.1\r\nHost: divisi\r\n\r\n", "no message of kind 71"),
        (raw(1, b"", 65535), "kind 1 has 65535 bytes"),
        (raw(2, b"", 134), "kind 2 has 134 bytes"),
        (raw(4, b"x"), "kind 4 has 1 bytes"),
        (raw(1, b""), "malformed hello"),
        (raw(1, b"\2\0\0"), "malformed hello"),
        (raw(2, bytes(4)), "malformed announcement"),
        (raw(2, struct.pack("<?II", False, 5, 5)), "has 5 of 5 rows in a second"),
        (raw(3, b"\0"), "malformed header"),
        (raw_header(b"", 0), "0 passes"),
        (raw_header(b"", 255), "has 255 passes, more than"),
        (raw_header(b"", 2), "malformed header"),
        (raw_header(struct.pack("<BHI", 1, 2, 0) + struct.pack("<HIIHII", 0, 1, 0, 0, 9, 0)), "a seat twice, no rows"),
        (raw_header(struct.pack("<BHI", 1, 1, 0) + struct.pack("<HII", 0, 0, 0)), "a seat twice, no rows"),
        (raw_header(struct.pack("<BHI", 1, 1, 0) + struct.pack("<HII", 0, 4, 4)), "or all in a second micro-batch"),
        (raw_header(struct.pack("<BHI", 1, 65535, 0)), "kind 1 and 65535 counts"),
        (raw_header(struct.pack("<BHI", 7, 0, 0)), "kind 7"),
        (raw_header(struct.pack("<BHI", 0, 0, 0)), "1 passes has one of kind 0"),
        (raw_header(struct.pack("<BHI", 1, 0, 0) + b"x"), "1 bytes after them"),
    ],
)
def test_noise_is_told_from_a_message(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MessageReader().feed(data)


def test_noise_takes_no_memory() -> None:
    """Whatever comes in whatever pieces, it is refused or fits in the longest message."""
    rng = random.Random(4)
    for _ in range(200):
        reader = MessageReader()
        data = bytes([rng.choice((1, 2, 3, 4)), *rng.randbytes(200_000)])
        refused = False
        while data and not refused:
            size = rng.randrange(1, 10_000)
            try:
                reader.feed(data[:size])
            except ValueError:
                refused = True
            else:
                assert len(reader._buffer) <= 65_535 + 15
            data = data[size:]
        assert refused


def test_agreement_waits_for_those_that_run_and_not_for_the_idle() -> None:
    agreement = StepAgreement(range(3))
    assert agreement.unfinished == (0, 1, 2)
    for worker in range(3):
        agreement.announce(worker, NOTHING)
    assert agreement.begin() is None
    assert agreement.unfinished == (), "all idle: nothing to wait for but a ring"
    agreement.announce(1, (5,))
    assert agreement.begin() == full({1: 5})
    assert agreement.unfinished == (1,)
    agreement.announce(0, (2,))
    assert agreement.begin() is None, "worker 1 is still in the step"
    agreement.announce(1, (0,))
    assert agreement.begin() == full({0: 2})


def test_who_wants_to_be_alone_takes_turns_with_all_others() -> None:
    agreement, wanted = StepAgreement(range(4)), {0: (1,), 1: (2,), 2: (3,), 3: (4,)}
    for worker, counts in wanted.items():
        agreement.announce(worker, counts, alone=worker in (1, 3))
    steps = []
    for _ in range(6):
        passes = agreement.begin()
        assert passes is not None
        ran = [worker for worker in wanted if passes[0].rows(worker)]
        assert agreement.unfinished == tuple(ran), "those who were left out still bring what they have announced"
        steps.append(tuple(ran))
        for worker in ran:
            agreement.announce(worker, wanted[worker], alone=worker in (1, 3))
    assert steps == [(1,), (3,), (0, 2)] * 2
    for worker in (1, 3):
        agreement.announce(worker, wanted[worker])
    assert agreement.begin() == full({0: 1, 1: 2, 2: 3, 3: 4})


def test_second_micro_batches_are_those_of_who_takes_part() -> None:
    agreement = StepAgreement(range(3))
    agreement.announce(0, (2, 5), second=3)
    agreement.announce(1, (4,))
    agreement.announce(2, (6,), second=1)
    assert agreement.begin() == (draft({0: 2}), Pass(PassKind.FULL, {0: 5, 1: 4, 2: 6}, {0: 3, 2: 1}))
    for worker in range(3):
        agreement.announce(worker, (2,) if worker else NOTHING)
    assert agreement.begin() == full({1: 2, 2: 2})


def test_micro_batches_of_a_pass() -> None:
    cut = Pass(PassKind.FULL, {0: 5, 1: 4, 2: 6}, {0: 3, 2: 1})
    assert cut.micro_batches == (Pass(PassKind.FULL, {0: 2, 1: 4, 2: 5}), Pass(PassKind.FULL, {0: 3, 2: 1}))
    assert full({0: 5})[0].micro_batches == full({0: 5})


def test_who_brings_rows_to_a_draft_only_is_waited_for_too() -> None:
    agreement = StepAgreement(range(2))
    agreement.announce(0, (4, 0))
    agreement.announce(1, NOTHING)
    assert agreement.begin() == (draft({0: 4}), *full({}))
    assert agreement.unfinished == (0,)


@pytest.mark.parametrize(
    ("announced", "passes"),
    [
        ({0: (2, 1, 5), 1: (3,)}, (draft({0: 2}), draft({0: 1}), *full({0: 5, 1: 3}))),
        ({4: (3,), 9: (3,)}, full({4: 3, 9: 3})),
        ({0: (1, 4), 1: (2, 2, 6), 2: (3, 9)}, (draft({0: 1, 1: 2, 2: 3}), draft({1: 2}), *full({0: 4, 1: 6, 2: 9}))),
    ],
)
def test_drafts_are_merged_from_the_first_and_the_full_pass_last(
    announced: dict[int, tuple[int, ...]], passes: tuple[Pass, ...]
) -> None:
    assert merge(announced) == passes


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
