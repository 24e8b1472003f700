"""The beats of an epoch's ranks: each says several times in `suspect_after_s` that it lives, and where its loop is.

They have connections and a thread of their own, so that they go on through long layers. The leader listens to all
others, who listen to the leader. Whose beats stop, or who stands still in a step under beats that go on, is suspected:
the epoch ends here at once, by whatever its loop waits for, and the next one is formed without it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from divisi.cluster.activity import Activity, Standstill
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.header import Beat
from divisi.cluster.gang.control.peer import Peer
from divisi.cluster.gang.control.wake import Wake
from divisi.cluster.seats import Patience, Seat

_BEATS = 10
"""In the time after which one is missed."""
_NEVER = float("inf")
"""When a peer was heard last that is not listened for."""


@dataclass(slots=True)
class _Heard:
    """What is known of a peer."""

    peer: Peer
    at: float
    standstill: Standstill
    stands_s: float = 0.0


class Beats:
    """Runs from `start` to `close`, for one rank in one epoch."""

    def __init__(
        self,
        epoch: int,
        seat: Seat,
        peers: Mapping[Seat, Peer],
        activity: Activity,
        patience: Patience,
        suspect: Callable[[Seat, str], None],
    ) -> None:
        """`peers` are closed with this. `suspect` is told of each once, by this thread: its seat, and why."""
        self._epoch, self._seat, self._activity = epoch, seat, activity
        self._patience, self._suspect = patience, suspect
        now = time.monotonic()
        # Nobody is missed before it was heard: the leader beats when all are there, and that has a deadline of its own.
        self._heard = {seat: _Heard(peer, _NEVER, Standstill(now)) for seat, peer in peers.items()}
        self._closed, self._wake = threading.Event(), Wake()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def start(self) -> None:
        """Begin; a gang of one has nobody to listen to."""
        if self._heard:
            self._thread.start()

    def close(self) -> None:
        """End; not from `suspect`."""
        self._closed.set()
        self._wake.set()
        if self._heard:
            self._thread.join()
        self._wake.close()
        for heard in self._heard.values():
            heard.peer.close()

    def _run(self) -> None:
        every_s = self._patience.suspect_after_s / _BEATS
        poller = select.poll()
        by_fd = {heard.peer.fileno(): seat for seat, heard in self._heard.items()}
        for fd in (*by_fd, self._wake.fileno()):
            poller.register(fd, select.POLLIN)
        last = beat_at = time.monotonic()
        while not self._closed.is_set():
            ready = poller.poll(max(beat_at - time.monotonic(), 0.0) * 1000)
            now = time.monotonic()
            if now - last > self._patience.suspect_after_s / 2:
                self._forgive(now)
            last = now
            for fd, _ in ready:
                if fd in by_fd and not self._listen(by_fd[fd], now):
                    poller.unregister(fd)
            if now >= beat_at:
                beat_at = now + every_s
                self._beat()
                self._look(now)

    def _forgive(self, now: float) -> None:
        """This thread has slept itself, and knows nothing of what the others did meanwhile."""
        for heard in self._heard.values():
            heard.at = max(heard.at, now)
            heard.standstill, heard.stands_s = Standstill(now), 0.0

    def _listen(self, seat: Seat, now: float) -> bool:
        """False once there is nothing to hear any more: it has left the epoch, which the mesh tells the loop."""
        heard = self._heard[seat]
        try:
            beats = [message for message in heard.peer.receive() if isinstance(message, Beat)]
        except StepAborted:
            heard.at = _NEVER
            return False
        if beats:
            heard.at = now
            heard.stands_s = heard.standstill.see(beats[-1].waits, beats[-1].busy, now)
        return True

    def _beat(self) -> None:
        data = Beat(self._epoch, self._seat, self._activity.waits, self._activity.busy).encode()
        for heard in self._heard.values():
            with contextlib.suppress(StepAborted):  # one that does not listen does not beat either
                heard.peer.send(data)

    def _look(self, now: float) -> None:
        for seat, heard in self._heard.items():
            if now - heard.at > self._patience.suspect_after_s:
                reason = f"was silent for {self._patience.suspect_after_s:g} s"
            elif heard.stands_s > self._patience.stuck_after_s:
                reason = f"stood still in a step for {self._patience.stuck_after_s:g} s"
            else:
                continue
            heard.at, heard.stands_s = _NEVER, 0.0
            self._suspect(seat, reason)
