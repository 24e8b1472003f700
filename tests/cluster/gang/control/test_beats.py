"""Who is silent, or stands still in a step, is suspected; who waits for others, leaves or has just slept is not."""

from __future__ import annotations

import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from divisi.cluster.activity import Activity, Standstill
from divisi.cluster.door import Framer, Handshake
from divisi.cluster.gang.control.beats import Beats
from divisi.cluster.gang.control.header import Beat, MessageReader
from divisi.cluster.gang.control.peer import Peer
from divisi.cluster.seats import Patience, Seat
from tests.support.credentials import CREDENTIALS

LEADER, OTHER = Seat("attention", 0), Seat("expert", 0)
PATIENCE = Patience(suspect_after_s=0.5, stuck_after_s=1.0)


class Far:
    """The other end of a connection: beats as told."""

    def __init__(self, end: socket.socket, framer: Framer) -> None:
        self._end = end
        self._framer = framer
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.activity = Activity()

    def beat(self) -> None:
        self._end.send(self._framer.seal(Beat(7, OTHER, self.activity.waits, self.activity.busy).encode()))

    def beat_on(self) -> None:
        """From now on."""

        def run() -> None:
            while not self._stop.wait(0.05):
                self.beat()

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def heard(self) -> list[Beat]:
        self._end.settimeout(10)
        data = b"".join(self._framer.feed(self._end.recv(4096)))
        return [message for message in MessageReader().feed(data) if isinstance(message, Beat)]

    def close(self) -> None:
        self.stop()
        self._end.close()


def go_inside(end: socket.socket, peer: Peer) -> Framer:
    """The handshake of the far end, while the near one is looked after here."""
    handshake = Handshake(CREDENTIALS.secret, "client")
    end.settimeout(10)
    end.sendall(handshake.begin())
    while not peer.is_inside:
        select.select([peer], [], [], 10)
        peer.receive()
        end.sendall(handshake.feed(end.recv(4096)))
    return handshake.finish()[0]


@pytest.fixture
def connect() -> Iterator[Callable[[], tuple[Far, queue.Queue[tuple[Seat, str]]]]]:
    made: list[tuple[Beats, Far]] = []

    def connect() -> tuple[Far, queue.Queue[tuple[Seat, str]]]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            end = socket.create_connection(listener.getsockname())
            near = listener.accept()[0]
        peer = Peer(near, PATIENCE.suspect_after_s, Handshake(CREDENTIALS.secret, "server"), OTHER)
        far = Far(end, go_inside(end, peer))
        suspects: queue.Queue[tuple[Seat, str]] = queue.Queue()
        beats = Beats(7, LEADER, {OTHER: peer}, Activity(), PATIENCE, lambda *suspect: suspects.put(suspect))
        beats.start()
        made.append((beats, far))
        return far, suspects

    yield connect
    for beats, far in made:
        beats.close()
        far.close()


Connect = Callable[[], tuple[Far, "queue.Queue[tuple[Seat, str]]"]]


def test_it_beats(connect: Connect) -> None:
    far, _ = connect()
    assert far.heard()[0] == Beat(7, LEADER, 0, False)


def test_who_falls_silent_is_suspected_once(connect: Connect) -> None:
    far, suspects = connect()
    far.beat_on()
    threading.Event().wait(1.5)
    assert suspects.empty(), "it was suspected while it beat"
    far.stop()
    assert suspects.get(timeout=10) == (OTHER, "was silent for 0.5 s")
    threading.Event().wait(1.0)
    assert suspects.empty()


def test_who_was_never_heard_is_not_missed(connect: Connect) -> None:
    """The beginning of an epoch has a deadline of its own."""
    _, suspects = connect()
    threading.Event().wait(1.2)
    assert suspects.empty()


def test_who_leaves_is_not_suspected(connect: Connect) -> None:
    far, suspects = connect()
    far.beat()
    far.close()
    threading.Event().wait(1.2)
    assert suspects.empty()


def test_who_stands_still_in_a_step_under_a_living_thread_is_suspected(connect: Connect) -> None:
    far, suspects = connect()
    far.beat_on()
    far.activity.goes_on()
    assert suspects.get(timeout=10) == (OTHER, "stood still in a step for 1 s")


def test_who_waits_for_others_may_stand_still(connect: Connect) -> None:
    far, suspects = connect()
    far.beat_on()
    far.activity.goes_on()
    far.activity.waiting()
    threading.Event().wait(2.0)
    assert suspects.empty()


def test_a_standstill_begins_anew_with_each_move() -> None:
    standstill = Standstill(now=0.0)
    assert standstill.see(1, True, 10.0) == 0
    assert standstill.see(1, True, 14.0) == 4
    assert standstill.see(2, True, 15.0) == 0
    assert standstill.see(2, False, 18.0) == 0
    assert standstill.see(2, True, 19.0) == 1
