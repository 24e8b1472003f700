"""Finds and ends the processes that descend from this one, also those whose parents are gone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Have descendants that lose their parent become children of this process, not of init. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def reap() -> dict[int, int]:
    """Collect children that have ended. Returns their exit statuses by pid, minus the signal where one ended them."""
    ended = {}
    with contextlib.suppress(ChildProcessError):  # no children at all
        while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def descendants(spared: Collection[psutil.Process] = ()) -> list[psutil.Process]:
    """All processes below this one that still run, without the children in `spared` and what is below them."""
    found = []
    for child in psutil.Process().children():
        if child not in spared:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [child, *child.children(recursive=True)]
    return [process for process in found if runs(process)]


def runs(process: psutil.Process) -> bool:
    """Whether it has neither ended nor waits only to be collected by its parent."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def socket_files(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of Unix sockets that these listen on."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {Path(socket.laddr) for socket in process.net_connections("unix") if socket.laddr.startswith("/")}
    return found


def end_descendants(within_s: float, spared: Collection[psutil.Process] = ()) -> list[str]:
    """Kill them all, those too that they start meanwhile. Returns the names of what is still there after `within_s`."""
    until = time.monotonic() + within_s
    while alive := descendants(spared):
        if time.monotonic() > until:
            return [f"{name_of(process)} ({process.pid})" for process in alive]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=0.2)
    reap()
    return []


def name_of(process: psutil.Process) -> str:
    """Its program's name."""
    try:
        return str(process.name())
    except psutil.NoSuchProcess:
        return "process"
