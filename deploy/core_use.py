"""Who computes with how many threads, and on which cores: settled and said before a Ray of its own starts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from divisi.cluster.cores import CorePlan, plan_cores, usable_cores
from divisi.cluster.seats import GangShape
from divisi.deploy.settings import Settings, SettingsError

JOINED = (
    "gang.pin_cores: the cores of a Ray cluster that was there before are not known; "
    "leave it out, or set RAY_ADDRESS=local to start a Ray of its own"
)


def core_plan(settings: Settings) -> CorePlan | None:
    """Which cores of this machine the ranks and ingress replicas keep to; None: to none. Raises SettingsError."""
    if not settings.gang.pin_cores:
        return None
    cores = sorted(os.sched_getaffinity(0))
    if (granted := usable_cores()) < len(cores):
        raise SettingsError(
            f"gang.pin_cores: this container may use the time of {granted} cores, but any of {len(cores)}; "
            "leave it out, or give the container cores of its own (a cpuset)"
        )
    return plan_cores(cores, settings.gang.shape.size, settings.http.ingress_replicas)


def rank_threads(settings: Settings, cores: int) -> int:
    """Threads of each rank on a machine of so many cores that has all of them, without a plan."""
    return settings.gang.threads_per_process or max(cores // settings.gang.shape.size, 1)


def waiting_policy(settings: Settings, cores: int) -> dict[str, str]:
    """The environment of ranks that would wait for work on each other's cores: OpenMP's threads then sleep.

    They spin for milliseconds otherwise, since each process counts only its own threads. This is settled once, for as
    many ranks as a policy may have; without a number of threads these share the cores anew in each epoch.
    """
    threads, ranks = settings.gang.threads_per_process, settings.gang.most_ranks
    crowded = threads is not None and threads > 1 and threads * ranks > cores
    return {"OMP_WAIT_POLICY": "PASSIVE"} if crowded else {}


def core_lines(settings: Settings, cores: int, plan: CorePlan | None, haproxy: bool) -> list[str]:
    """For people: what each process gets of a machine that has all of them."""
    shape, replicas = settings.gang.shape, settings.http.ingress_replicas
    http = _count(replicas, "ingress replica") + f" and {'HAProxy' if haproxy else 'the proxy'}"
    if plan is not None:
        return [_pinned_rank(settings, shape, rank, plan) for rank in range(shape.size)] + [
            f"  {http}: 1 thread each, on {_named(plan.service)}"
        ]
    threads = rank_threads(settings, cores)
    ranks = f"  {_count(shape.size, 'rank')} with {_count(threads, 'thread')}{'' if shape.size == 1 else ' each'}"
    lines = [f"{ranks}, {http} with 1, on any of {_count(cores, 'core')}"]
    if waiting_policy(settings, cores):
        most = settings.gang.most_ranks
        when = "" if threads * shape.size > cores else f" once there are {most} ranks"
        less = _count(max(cores // most, 1), "thread")
        lines.append(f"  more threads than cores{when}: those that wait sleep, as not with {less} each")
    return lines


def _pinned_rank(settings: Settings, shape: GangShape, rank: int, plan: CorePlan) -> str:
    own = plan.ranks[rank]
    threads = settings.gang.threads_per_process or len(own)
    return f"  {shape.seat(rank)}: {_count(threads, 'thread')}, on {_named(own)}"


def _named(cores: Sequence[int]) -> str:
    """`core 3`, `cores 0-5,8`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"core{'' if len(cores) == 1 else 's'} {text}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
