"""Processes of this machine whose end is noticed."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from divisi.cluster.gang.membership.neighbours import Neighbours, own_process
from divisi.cluster.seats import LocalProcess

_PRINT = """
from divisi.cluster.gang.membership.neighbours import own_process
print(own_process().pid, own_process().born, flush=True)
input()
"""


@contextlib.contextmanager
def process() -> Iterator[tuple[subprocess.Popen[str], LocalProcess]]:
    with subprocess.Popen([sys.executable, "-c", _PRINT], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        pid, born = map(int, child.stdout.readline().split())
        yield child, LocalProcess(pid, born)
        child.kill()


@pytest.fixture
def ended() -> queue.Queue[str]:
    return queue.Queue()


@pytest.fixture
def neighbours(ended: queue.Queue[str]) -> Iterator[Neighbours]:
    with contextlib.closing(Neighbours(ended.put)) as neighbours:
        yield neighbours


def test_the_end_of_one_is_told_once_and_at_once(neighbours: Neighbours, ended: queue.Queue[str]) -> None:
    with process() as (child, mark):
        assert mark.pid == child.pid
        neighbours.watch({"x": mark, "own": own_process()})
        with pytest.raises(queue.Empty):
            ended.get(timeout=0.1)
        begin = time.monotonic()
        child.kill()
        assert ended.get(timeout=5) == "x"
        assert time.monotonic() - begin < 1.0
        neighbours.watch({"x": mark, "own": own_process()})  # it may be a zombie still, and is not told again
        with pytest.raises(queue.Empty):
            ended.get(timeout=0.1)


def test_who_is_watched_no_more_is_not_told(neighbours: Neighbours, ended: queue.Queue[str]) -> None:
    with process() as (child, mark), process() as (other, later):
        neighbours.watch({"x": mark})
        neighbours.watch({"y": later})
        child.kill()
        other.kill()
        assert ended.get(timeout=5) == "y"
        assert ended.empty()


def test_another_process_of_that_number_is_not_watched(neighbours: Neighbours, ended: queue.Queue[str]) -> None:
    """It has the number by chance: the one that is meant is gone, or counted in another namespace."""
    with process() as (child, mark):
        neighbours.watch({"x": replace(mark, born=mark.born + 1), "nobody": LocalProcess(2**22 + 1, 1)})
        child.kill()
        with pytest.raises(queue.Empty):
            ended.get(timeout=0.2)


def test_nothing_is_left_open(ended: queue.Queue[str]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    neighbours = Neighbours(ended.put)
    with process() as (_, mark):
        neighbours.watch({"x": mark})
        neighbours.close()
    assert len(set(os.listdir("/proc/self/fd"))) == len(before)
