"""A rank's loading leaves none of its threads behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from divisi.cluster.loading import load_in_thread
from divisi.cluster.seats import GangShape
from tests.support.thread_gang import small_spec

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, time
from pathlib import Path
import torch
from divisi.cluster.loading import load_in_thread
from divisi.cluster.seats import GangShape
from tests.support.thread_gang import small_spec

def threads():
    return len(os.listdir("/proc/self/task"))

spec = small_spec(Path("/none"), GangShape(1, 0), threads=3)
summed, meanwhile = load_in_thread(spec, lambda: (float(torch.ones(10**7).sum()), threads()))
until = time.monotonic() + 10
while threads() > meanwhile - 3 and time.monotonic() < until:
    time.sleep(0.01)  # they end by themselves, and nobody is told
print(summed == 1e7, meanwhile - threads())
"""


def test_the_threads_that_loaded_are_gone() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
                          env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip
    # The others are a pool of torch's own, which OpenMP does not count.
    assert done.stdout.split() == ["True", "3"], "the thread itself, and the two of OpenMP"


def test_what_fails_fails_for_the_caller() -> None:
    def load() -> None:
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        load_in_thread(small_spec(Path("/none"), GangShape(1, 0), threads=1), load)
