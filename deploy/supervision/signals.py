"""Signals as something that can be waited for beside other descriptors."""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Iterable
from types import FrameType
from typing import TypeVar

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalInbox:
    """Signals that arrive go into a pipe in order, so that none is lost between two waits. Main thread only."""

    def __init__(self, *numbers: signal.Signals) -> None:
        """Receive these, except a SIGHUP that is ignored, as `nohup` does."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former = {
            number: signal.signal(number, _note)
            for number in numbers
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }

    def fileno(self) -> int:
        """For `readable`."""
        return self._read

    def take(self) -> list[int]:
        """What has come since the last call."""
        try:
            return list(os.read(self._read, 4096))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._read)
        os.close(self._write)


def _note(number: int, frame: FrameType | None) -> None:
    """Python has already written the number into the pipe."""


Source = TypeVar("Source", bound=SignalInbox | int)


def readable(sources: Iterable[Source], timeout_s: float | None) -> list[Source]:
    """Those that can be read, or have ended, once there is one or the time is over (None: never).

    `select` would do, but for descriptors from 1,024 on.
    """
    with selectors.PollSelector() as selector:
        for source in sources:
            selector.register(source, selectors.EVENT_READ, source)
        return [key.data for key, _ in selector.select(timeout_s)]
