"""How many CPU threads a rank computes with: its share of the cores of the machine that it runs on."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from divisi.cluster.cores import CorePlan, keep_to, usable_cores
from divisi.cluster.gang.loops.inbox import Assignment

log = logging.getLogger(__name__)

SPIN_S = 0.02
"""As long as a peer needs for a layer of a full batch. Who slept meanwhile is slow for a while: with 2 ms a decode step
of 16 rows took a fifteenth longer."""


@dataclass(frozen=True, slots=True)
class CoreShare:
    """What a rank's loop takes of its machine in each epoch; see `GangSpec` for both."""

    threads: int | None
    plan: CorePlan | None = None

    def take(self, assignment: Assignment) -> float:
        """Set torch's threads in the calling thread: fixed, or the cores over the epoch's ranks on this machine.

        With a plan, this whole process keeps to its rank's cores, and has as many threads; a shard that was not planned
        for has no cores of its own. Anew in each epoch, since a rank that was replaced may run elsewhere. Returns for
        how many seconds who waits for a peer may keep its core: 0 where ranks share cores, or those that wait would
        take them from those that compute.
        """
        membership, rank = assignment.membership, assignment.rank
        place = membership.shape.rank(membership.seats[rank])
        if self.plan is None or place >= len(self.plan.ranks):
            beside = membership.ranks_beside(rank)
            cores, alone = usable_cores() // beside, usable_cores() >= beside and self.plan is None
        else:
            own = self.plan.ranks[place]
            others = {core for at, of_rank in enumerate(self.plan.ranks) if at != place for core in of_rank}
            keep_to(own)
            cores, alone = len(own), others.isdisjoint(own)
        torch.set_num_threads(self.threads or max(cores, 1))
        log.info(
            "epoch %d: %s computes with %d threads on cores %s%s",
            membership.epoch,
            membership.seats[rank],
            torch.get_num_threads(),
            ", ".join(map(str, sorted(os.sched_getaffinity(0)))),
            "" if alone else ", which other ranks need too",
        )
        return SPIN_S if alone else 0.0
