"""Notices at once when a process of this machine ends, sooner than its peers can be sure of it. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from divisi.cluster.gang.control.wake import Wake
from divisi.cluster.seats import LocalProcess


def own_process() -> LocalProcess:
    """This one."""
    return LocalProcess(os.getpid(), _born(os.getpid()))


def process_age_s() -> float:
    """Since this process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _born(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _born(pid: int) -> int:
    """When a process began, in clock ticks since the machine did. Raises OSError where there is none."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return int(stat[stat.rindex(b")") + 2 :].split()[19])  # its name, in parentheses, may hold anything


class Neighbours:
    """Watches processes until closed. Of other machines, or of another namespace of numbers, it watches none."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        """`ended` is told the name of each that ends, once, by a thread of this."""
        self._ended = ended
        self._wanted: Mapping[str, LocalProcess] = {}
        self._wake, self._closed = Wake(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="neighbours", daemon=True)
        self._thread.start()

    def watch(self, processes: Mapping[str, LocalProcess]) -> None:
        """Watch these, by name, and no others."""
        self._wanted = processes
        self._wake.set()

    def close(self) -> None:
        """Watch nothing any more. Not from `ended`."""
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self._wake.close()

    def _run(self) -> None:
        watched: dict[str, int | None] = {}
        while True:
            self._wake.clear()  # first: what it has told is looked for below
            if self._closed.is_set():
                break
            self._follow(watched)
            poller = select.poll()
            by_fd = {fd: name for name, fd in watched.items() if fd is not None}
            for fd in (self._wake.fileno(), *by_fd):
                poller.register(fd, select.POLLIN)
            for fd, _ in poller.poll():
                if fd in by_fd:
                    os.close(fd)
                    watched[by_fd[fd]] = None
                    if by_fd[fd] in self._wanted:  # not any more, perhaps, since this waited
                        self._ended(by_fd[fd])
        self._wanted = {}
        self._follow(watched)

    def _follow(self, watched: dict[str, int | None]) -> None:
        """Bring the descriptors up to date; None is for who cannot be watched any more."""
        wanted = self._wanted
        for name in watched.keys() - wanted.keys():
            if (fd := watched.pop(name)) is not None:
                os.close(fd)
        for name in wanted.keys() - watched.keys():
            watched[name] = None
            with contextlib.suppress(OSError):
                watched[name] = _opened(wanted[name])


def _opened(process: LocalProcess) -> int:
    """A descriptor that can be read once it has ended. Raises OSError where it is not that process."""
    fd = os.pidfd_open(process.pid)
    try:
        if _born(process.pid) != process.born:
            raise ProcessLookupError(f"{process.pid} is another process")
    except OSError:
        os.close(fd)
        raise
    return fd
