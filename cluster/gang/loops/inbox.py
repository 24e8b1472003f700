"""What other threads tell a lockstep loop: enter an epoch, drop one, stop. Imports no torch."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from dataclasses import dataclass

from divisi.cluster.activity import Activity
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.wake import Wake
from divisi.cluster.seats import Membership


@dataclass(frozen=True, slots=True)
class Assignment:
    """An epoch to enter, and as which rank."""

    membership: Membership
    rank: int


class EpochInbox:
    """The epoch that a loop shall be in. Written by the membership watch, read by the loop."""

    def __init__(self) -> None:
        self.wake = Wake()
        self.activity = Activity()
        """Where the loop is, told by itself."""
        self._lock = threading.Lock()
        self._offered: Assignment | None = None
        self._over = 0
        """The highest epoch that must not be worked in any more."""
        self._changing = 0
        """The highest epoch that is to end between two steps."""
        self._break: tuple[int, Callable[[], None]] | None = None
        self._stopping = False

    def offer(self, assignment: Assignment) -> None:
        """Send the loop into an epoch."""
        with self._lock:
            self._offered = assignment
        self.wake.set()

    def interrupt(self, epoch: int) -> None:
        """Get the loop out of an epoch, whatever it waits for."""
        with self._lock:
            self._over = max(self._over, epoch)
            breaks = self._break
        self.wake.set()
        if breaks is not None and breaks[0] <= epoch:
            breaks[1]()

    def on_interrupt(self, epoch: int, action: Callable[[], None]) -> None:
        """What ends the waits of that epoch that look for nothing here, in place of the former epoch's.

        Carried out by the thread that interrupts the epoch, maybe more than once; at once where it is over already.
        """
        with self._lock:
            self._break = epoch, action
        if self.is_over(epoch):
            action()

    def is_over(self, epoch: int) -> bool:
        """Whether an epoch was interrupted."""
        return epoch <= self._over

    def change(self, epoch: int) -> None:
        """Have an epoch end between two of its steps. For its leader."""
        with self._lock:
            self._changing = max(self._changing, epoch)
        self.wake.set()

    def is_changing(self, epoch: int) -> bool:
        """Whether an epoch is to end between two of its steps."""
        return epoch <= self._changing

    def stop(self) -> None:
        """End the loop for good."""
        with self._lock:
            self._stopping = True
        self.wake.set()

    def reopen(self) -> None:
        """Take epochs for another loop, once that which was stopped has ended."""
        with self._lock:
            self._offered, self._stopping = None, False

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    def take(self) -> Assignment | None:
        """The epoch to enter, once. It may be over already: `check` it, so that the loop reports to have left it."""
        with self._lock:
            offered, self._offered = self._offered, None
            return offered

    def wait(self) -> None:
        """Park until somebody wakes the loop."""
        poller = select.poll()
        poller.register(self.wake.fileno(), select.POLLIN)
        poller.poll()
        self.wake.clear()

    def check(self, epoch: int) -> None:
        """Raise StepAborted when the epoch is over."""
        if self._stopping:
            raise StepAborted("this rank is shutting down")
        if epoch <= self._over:
            raise StepAborted(f"epoch {epoch} is over")
