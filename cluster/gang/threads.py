"""How many CPU threads a rank computes with: its share of the cores of the machine that it runs on."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from divisi.cluster.gang.inbox import Assignment

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def share_cores(fixed: int | None, assignment: Assignment) -> None:
    """Set torch's threads in the calling thread: `fixed`, or the cores over the epoch's ranks on this machine.

    Anew in each epoch, since a rank that was replaced may run elsewhere.
    """
    beside = assignment.membership.ranks_beside(assignment.rank)
    torch.set_num_threads(fixed or max(usable_cores() // beside, 1))


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
