"""How many CPU threads a rank computes with: its share of the cores of the machine that it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from divisi.cluster.cores import CorePlan, keep_to, usable_cores
from divisi.cluster.gang.inbox import Assignment


@dataclass(frozen=True, slots=True)
class CoreShare:
    """What a rank's loop takes of its machine in each epoch; see `GangSpec` for both."""

    threads: int | None
    plan: CorePlan | None = None

    def take(self, assignment: Assignment) -> None:
        """Set torch's threads in the calling thread: fixed, or the cores over the epoch's ranks on this machine.

        With a plan, this whole process keeps to its rank's cores, and has as many threads. Anew in each epoch, since a
        rank that was replaced may run elsewhere.
        """
        if self.plan is None:
            cores = usable_cores() // assignment.membership.ranks_beside(assignment.rank)
        else:
            membership = assignment.membership
            own = self.plan.ranks[membership.shape.rank(membership.seats[assignment.rank])]
            keep_to(own)
            cores = len(own)
        torch.set_num_threads(self.threads or max(cores, 1))
