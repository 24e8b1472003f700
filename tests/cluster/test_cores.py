"""Cores: what a container grants, how a plan deals them out, and that a process then keeps to them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from divisi.cluster.cores import plan_cores, usable_cores

KEPT = """
import os, threading
from divisi.cluster.cores import keep_to
stop = threading.Event()
older = threading.Thread(target=stop.wait)
older.start()
core = max(os.sched_getaffinity(0))
keep_to([core])
younger = threading.Thread(target=stop.wait)
younger.start()
print(all(os.sched_getaffinity(int(thread)) == {core} for thread in os.listdir("/proc/self/task")))
stop.set()
"""


@pytest.mark.parametrize(
    ("cores", "ranks", "ingress_replicas", "of_ranks", "service"),
    [
        (2, 1, 1, [[0]], [1]),
        (8, 1, 1, [[0, 1, 2, 3, 4, 5, 6]], [7]),
        (8, 3, 1, [[0, 1, 2], [3, 4], [5, 6]], [7]),
        (8, 3, 2, [[0, 1], [2, 3], [4, 5]], [6, 7]),
        (4, 3, 9, [[0], [1], [2]], [3]),
        (2, 2, 1, [[0], [1]], [0, 1]),
        (2, 3, 1, [[0], [1], [0]], [0, 1]),
        (1, 1, 1, [[0]], [0]),
    ],
)
def test_a_plan(cores: int, ranks: int, ingress_replicas: int, of_ranks: list[list[int]], service: list[int]) -> None:
    plan = plan_cores([2 * core for core in range(cores)], ranks, ingress_replicas)
    assert [[core // 2 for core in own] for own in plan.ranks] == of_ranks
    assert [core // 2 for core in plan.service] == service


def test_all_threads_keep_to_them() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("own", "limits", "cores"),
    [
        ("0::/", {"": "200000 100000"}, 2),  # a container
        ("0::/", {"": "50000 100000"}, 1),
        ("0::/", {"": "max 100000"}, 8),
        ("12:cpu:/x\n0::/service/part", {"service": "300000 100000", "service/part": "max 100000"}, 3),
        ("0::/service/part", {"service": "900000 100000", "service/part": "400000 100000"}, 4),
        ("0::/", {"": "1600000 100000"}, 8),
        ("4:memory:/x", {}, 8),
    ],
)
def test_the_cores_that_a_container_grants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, limits: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for folder, limit in limits.items():
        (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / folder / "cpu.max").write_text(f"{limit}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert usable_cores(tmp_path / "cgroup", tmp_path / "own") == cores
