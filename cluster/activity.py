"""Where a loop is, so that other threads and the other ranks see whether it goes on. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(slots=True)
class Activity:
    """Written by the loop's thread, at its waits; read by any other.

    A loop that waits for a peer is not to blame for standing still; one that computes and stands still is.
    """

    waits: int = 0
    """Those that have ended: one or more a layer. Grows while the loop goes on."""
    busy: bool = False
    """In a step, and waiting for nobody."""

    def waiting(self) -> None:
        """It begins to wait for others."""
        self.busy = False

    def goes_on(self) -> None:
        """It has what it waited for."""
        self.waits += 1
        self.busy = True


class Standstill:
    """For how long a loop has been busy in one place, by what one has seen of it."""

    def __init__(self, now: float) -> None:
        self._waits, self._since = -1, now

    def see(self, waits: int, busy: bool, now: float) -> float:
        """Seconds that it has been in its place; 0 where it waits for others."""
        if waits != self._waits or not busy:
            self._waits, self._since = waits, now
        return now - self._since


class StuckCheck:
    """Whether the loop of this process is stuck in a step. To be asked now and then."""

    def __init__(self, activity: Activity, stuck_after_s: float) -> None:
        self._activity, self._stuck_after_s = activity, stuck_after_s
        self._standstill = Standstill(time.monotonic())

    def __call__(self) -> bool:
        """Whether it is."""
        activity = self._activity
        return self._standstill.see(activity.waits, activity.busy, time.monotonic()) > self._stuck_after_s
