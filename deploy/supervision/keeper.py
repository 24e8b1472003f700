"""Watches over the driver: passes orders on, insists on deadlines, and ends whatever is left. Free of Ray itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from divisi.deploy.supervision.deadlines import KEEPER_S, TAKE_DOWN_S, Deadlines
from divisi.deploy.supervision.forked import fork
from divisi.deploy.supervision.orders import AT_ONCE, STOP, Orders, Report
from divisi.deploy.supervision.orphans import (
    adopt_orphans,
    descendants,
    end_descendants,
    name_of,
    reap,
    runs,
    socket_files,
)
from divisi.deploy.supervision.signals import STOP_SIGNALS, SignalInbox, readable

_LOOK_EVERY_S = 1.0
_VITAL = ("gcs_server", "raylet")
"""Without either of these a Ray instance is lost, and calls of its driver may never return."""
DELETE = "python -c 'from ray import serve; serve.delete(\"divisi\")'"
"""Ends the application on a cluster that a shell can reach; Ray's own command line has nothing for one application."""
_UNREACHABLE_S = 3.0
"""Once it is to stop, the driver is not left waiting for a joined cluster that nobody can reach for so long."""


def keep(work: Callable[[Orders], int], undo: Callable[[str, bool], object], orders: int, grace_s: float) -> int:
    """Run `work` as the driver until it ends or must end. Returns its exit status, 1 where it had to be killed."""
    os.setsid()
    adopt_orphans()
    inbox = SignalInbox(*STOP_SIGNALS, signal.SIGCHLD)
    driver_orders, to_driver = os.pipe()
    from_driver, driver_reports = os.pipe()

    def drive() -> int:
        inbox.close()
        for fd in (orders, to_driver, from_driver):
            os.close(fd)
        told = Orders(driver_orders, driver_reports)
        told.heed_signals()
        return work(told)

    driver = fork(drive)
    os.close(driver_orders)
    os.close(driver_reports)
    keeper = Keeper(driver, Deadlines(grace_s), inbox, orders, to_driver, from_driver)
    status = keeper.wait()
    keeper.look_for_ray()
    left = end_descendants(KEEPER_S)
    if keeper.undo_at:
        _run_undo(undo, keeper.undo_at, keeper.report.serve_was_there)
    for path in keeper.socket_files:  # which Ray leaves behind even if it is shut down
        path.unlink(missing_ok=True)
    if keeper.report.folder:
        shutil.rmtree(keeper.report.folder, ignore_errors=True)
    if left:
        say(f"divisi: failed: cannot end {', '.join(left)}")
        return 1
    return status


class Keeper:
    """The keeper's loop: everything that can make the driver end, or be ended."""

    def __init__(
        self, driver: int, deadlines: Deadlines, inbox: SignalInbox, orders: int, to_driver: int, from_driver: int
    ) -> None:
        self.report = Report()
        self.undo_at = ""
        """Where the application is left on a cluster whose driver died without removing it."""
        self.socket_files: set[Path] = set()
        self._driver = driver
        self._deadlines = deadlines
        self._inbox, self._orders, self._to_driver, self._from_driver = inbox, orders, to_driver, from_driver
        self._heard = b""
        self._sources: list[SignalInbox | int] = [inbox, orders, from_driver]
        self._vital: dict[str, psutil.Process] = {}
        self._reached_at = 0.0

    def wait(self) -> int:
        """Return when the driver has ended, or must not go on; with the exit status that follows."""
        while True:
            end = self._deadlines.end
            wait_s = _LOOK_EVERY_S if end is None else min(max(end - time.monotonic(), 0.0), _LOOK_EVERY_S)
            self._listen(readable(self._sources, wait_s))
            if (status := reap().get(self._driver)) is not None:
                self._hear_the_last()
                return self._ended(status)
            if (lost := self._lost()) is not None:
                say(f"divisi: {'Stopping without Ray' if self._stopping else 'failed'}: {lost}")
                return 0 if self._stopping else 1
            if end is not None and time.monotonic() >= end:
                return self._overdue()

    @property
    def _stopping(self) -> bool:
        return self._deadlines.stop_at is not None

    def _listen(self, ready: list[SignalInbox | int]) -> None:
        if self._inbox in ready and any(number in STOP_SIGNALS for number in self._inbox.take()):
            self._pass_on(STOP)  # a signal to all processes of a service; the front process counts them
        if self._orders in ready:
            if order := os.read(self._orders, 1):
                self._pass_on(order)
            else:
                self._sources.remove(self._orders)
                self._deadlines.abandon(time.monotonic())
                self._pass_on(AT_ONCE)
        if self._from_driver in ready:
            if heard := os.read(self._from_driver, 4096):
                self._hear(heard)
            else:
                self._sources.remove(self._from_driver)

    def _pass_on(self, order: bytes) -> None:
        now = time.monotonic()
        self._reached_at = now if self._reached_at == 0.0 else self._reached_at
        self._deadlines.hurry(now) if order == AT_ONCE else self._deadlines.stop(now)
        with contextlib.suppress(BrokenPipeError):  # it has ended
            os.write(self._to_driver, order)

    def _hear_the_last(self) -> None:
        """Reports that the driver has sent just before its end."""
        while self._from_driver in self._sources and readable([self._from_driver], 0):
            self._listen([self._from_driver])

    def _hear(self, heard: bytes) -> None:
        *lines, self._heard = (self._heard + heard).split(b"\n")
        for line in lines:
            self.report = Report(**json.loads(line))
        self._deadlines.has_ray = self.report.own or bool(self.report.joined)
        self._deadlines.answers_open = self.report.answers_open
        self._deadlines.joined = bool(self.report.joined)
        if self.report.taking_down:
            self._deadlines.take_down(time.monotonic())
        if self.report.own and not self._vital:
            self.look_for_ray()

    def look_for_ray(self) -> None:
        """Note Ray's own processes and their socket files, while there are any."""
        named = {name_of(process): process for process in descendants()}
        self._vital = {name: process for name, process in named.items() if name in _VITAL}
        self.socket_files |= socket_files(self._vital.values())

    def _lost(self) -> str | None:
        """Why the driver would wait in vain for Ray, or None."""
        for name, process in self._vital.items():
            if not runs(process) and not self.report.taking_down:
                return f"Ray's {name} (pid {process.pid}) has ended"
        if self.report.joined and self._stopping:
            if reachable(self.report.joined):
                self._reached_at = time.monotonic()
            elif time.monotonic() - self._reached_at > _UNREACHABLE_S:
                return f"the Ray cluster at {self.report.joined} cannot be reached"
        return None

    def _ended(self, status: int) -> int:
        if status >= 0:
            return status
        if self._stopping and not self.report.joined:
            return 0  # what it has not taken down itself is ended here
        say(f"divisi: failed: the server's driver was ended by {signal.Signals(-status).name}")
        self.undo_at = self.report.joined if self.report.deployed else ""
        return 1

    def _overdue(self) -> int:
        nothing_open = self.report.taking_down or not self.report.answers_open
        if self._stopping and nothing_open and not self.report.joined:
            return 0  # what is left of a Ray instance of its own can be killed as well as taken down
        address = self.report.joined
        where = f"; what it left on the cluster at {address} goes with `{DELETE}`" if address else ""
        say(f"divisi: failed: the server did not stop in time and was killed{where}")
        return 1


def reachable(address: str) -> bool:
    """Whether somebody listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=0.5).close()
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Print to standard error, if there is still anybody who reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _run_undo(undo: Callable[[str, bool], object], address: str, keep_serve: bool) -> None:
    """Have another process remove what the driver has left on its cluster, and give it the time of a take-down."""

    def remove() -> int:
        undo(address, keep_serve)
        return 0

    child = fork(remove)
    until = time.monotonic() + TAKE_DOWN_S
    status = None
    while (status := reap().get(child, status)) is None and time.monotonic() < until:
        time.sleep(0.1)  # for one child among descendants that may end, too
    end_descendants(KEEPER_S)
    if status != 0:
        say(f"divisi: failed: the application is left on the cluster at {address}; end it with `{DELETE}`")
