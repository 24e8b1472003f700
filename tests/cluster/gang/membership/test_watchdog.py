"""A process that hangs is killed by the one beside it, and one that goes on is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

_RANK = """
import sys, time
from divisi.cluster.gang.membership.watchdog import Watchdog
stuck = []
dog = Watchdog(lambda: bool(stuck), hung_after_s=0.6)
print(dog._dog.pid, flush=True)
for line in sys.stdin:
    if line == "stuck\\n":
        stuck.append(True)
    if line == "close\\n":
        dog.close()
        print("closed", flush=True)
time.sleep(60)
"""


def start() -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process with a watchdog, and the latter."""
    rank = subprocess.Popen([sys.executable, "-c", _RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    return rank, psutil.Process(int(rank.stdout.readline()))


def tell(rank: subprocess.Popen[str], line: str) -> None:
    assert rank.stdin is not None
    rank.stdin.write(f"{line}\n")
    rank.stdin.flush()


def test_a_stopped_process_is_killed_and_the_watchdog_ends_with_it() -> None:
    rank, dog = start()
    time.sleep(1.5)  # it is watched all the while
    assert rank.poll() is None, "it was killed though it lives"
    os.kill(rank.pid, signal.SIGSTOP)
    assert rank.wait(20) == -signal.SIGKILL
    dog.wait(20)


def test_a_process_that_is_stuck_is_killed() -> None:
    rank, dog = start()
    tell(rank, "stuck")
    assert rank.wait(20) == -signal.SIGKILL
    dog.wait(20)


def test_a_watchdog_that_was_sent_away_kills_nobody() -> None:
    rank, dog = start()
    tell(rank, "close")
    assert rank.stdout is not None
    assert rank.stdout.readline() == "closed\n"
    dog.wait(20)
    os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(1.5)
    assert psutil.Process(rank.pid).status() == psutil.STATUS_STOPPED
    rank.kill()
    rank.wait(20)
