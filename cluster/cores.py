"""The cores of a machine: how many this process may use, and which process keeps to which. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_OWN_THREADS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Which cores of its one machine each process of a server keeps to."""

    ranks: tuple[tuple[int, ...], ...]
    """Of each rank: none in common, unless there are fewer cores than ranks."""
    service: tuple[int, ...]
    """Of the ingress replicas, and of what is in front of them."""


def plan_cores(cores: Sequence[int], ranks: int, ingress_replicas: int) -> CorePlan:
    """Deal out the cores: one for each ingress replica as long as every rank has one, the others to the ranks evenly.

    With no more cores than ranks, each rank keeps to one of them, in turn, and the ingress replicas to none.
    """
    spare = len(cores) - ranks
    if spare <= 0:
        return CorePlan(tuple((cores[rank % len(cores)],) for rank in range(ranks)), tuple(cores))
    service = min(ingress_replicas, spare)
    each, more = divmod(len(cores) - service, ranks)
    ends = list(accumulate(each + (rank < more) for rank in range(ranks)))
    blocks = (tuple(cores[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    return CorePlan(tuple(blocks), tuple(cores[ends[-1] :]))


def keep_to(cores: Collection[int]) -> None:
    """Have all threads of this process, and those that they start, run on these cores only. Raises OSError."""
    for thread in _OWN_THREADS.iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def usable_cores(cgroups: Path = _CGROUPS, own_cgroup: Path = _OWN_CGROUP) -> int:
    """Cores that this process may use: its affinity, or the CPU time that its cgroup or one above it grants.

    `os.cpu_count` has all cores of the machine instead, also in a container that gets two of sixty-four. Reads cgroup
    v2 only, where the file is `cpu.max`: "quota period" in microseconds, or "max period".
    """
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroups_above(cgroups, own_cgroup):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            cores = min(cores, int(quota) // int(period))
        except (OSError, ValueError):  # no such file or no limit here
            continue
    return max(cores, 1)


def _cgroups_above(cgroups: Path, own_cgroup: Path) -> list[Path]:
    try:
        lines = own_cgroup.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    return [cgroups / own, *(parent for parent in (cgroups / own).parents if parent.is_relative_to(cgroups))]
