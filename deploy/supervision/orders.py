"""What the driver hears from its keeper, and what it reports. Over pipes: a byte an order, a JSON line a report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from dataclasses import asdict, dataclass, replace
from types import FrameType

from divisi.deploy.supervision.signals import STOP_SIGNALS

STOP = b"s"
AT_ONCE = b"n"


@dataclass(frozen=True)
class Report:
    """What the keeper has to know of the driver; later reports replace earlier ones."""

    answers_open: bool = False
    """Whether answers may be open."""
    own: bool = False
    """Whether it runs a Ray instance of its own, as its children."""
    joined: str = ""
    """Address of the cluster that it has joined instead."""
    deployed: bool = False
    """Whether the application may be on that cluster: then it has to be removed, whatever becomes of the driver."""
    serve_was_there: bool = False
    """Whether Ray Serve ran on that cluster already, and so is not to be ended."""
    folder: str = ""
    """One of its own that has to be gone once all its processes are."""
    taking_down: bool = False
    """Whether it ends everything itself: nothing is open any more, and Ray's processes may go."""


class Orders:
    """The driver's end. The events are set by orders, both of them once the keeper is gone."""

    def __init__(self, orders: int, reports: int) -> None:
        """Takes the reading end of the pipe of orders, and the writing end of that of reports."""
        self.stop, self.at_once = threading.Event(), threading.Event()
        self._orders, self._reports = orders, reports
        self._said = Report()
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def heed_signals(self) -> None:
        """Take a signal to this process as an order to stop, however often it comes; the front process counts.

        Called again after Ray has installed a handler of its own. Main thread only.
        """
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._heed)

    def report(self, **news: bool | str) -> None:
        """Tell the keeper fields of `Report` that have changed."""
        self._said = replace(self._said, **news)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):  # the keeper is gone, which `stop` says
            os.write(self._reports, json.dumps(asdict(self._said)).encode() + b"\n")

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()

    def _listen(self) -> None:
        while order := os.read(self._orders, 1):
            self.stop.set()
            if order == AT_ONCE:
                self.at_once.set()
        self.stop.set()
        self.at_once.set()
