"""A process beside a rank, on its node, that kills it once it hangs: nobody else can, where it is cut off.

Run as a program, this file is that process: it reads what the rank writes now and then, and so needs no Python but the
standard library's. Silence is counted in waits of its own, so that a machine that stood still as a whole kills nobody.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

HUNG_AFTER_S = 5.0
"""A process that is stopped, or whose interpreter is, for so long will not come back by itself."""
_LOOKS = 20


class Watchdog:
    """Begins at once; ends with this process, or by `close`."""

    def __init__(self, stuck: Callable[[], bool] = lambda: False, hung_after_s: float = HUNG_AFTER_S) -> None:
        """`stuck`: whether this process is to be killed though it runs; asked several times a second."""
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(hung_after_s)]
        self._dog = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._stuck, self._every_s = stuck, hung_after_s / _LOOKS
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """End it; this process goes on unwatched."""
        self._closed.set()
        assert self._dog.stdin is not None
        with contextlib.suppress(OSError):
            self._dog.stdin.close()
        self._dog.wait()

    def _run(self) -> None:
        assert self._dog.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it was closed, or somebody has killed the other process
            while not self._closed.wait(self._every_s):
                if not self._stuck():
                    os.write(self._dog.stdin.fileno(), b".")


def _watch(pid: int, hung_after_s: float) -> None:
    """Kill the parent once it has been silent for so long; end with it."""
    silent = 0
    while silent < _LOOKS + 1:
        ready, _, _ = select.select([0], [], [], hung_after_s / _LOOKS)
        if not ready:
            silent += 1
            continue
        silent = 0
        if not os.read(0, 4096):
            return
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]))
