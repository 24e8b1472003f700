"""An expert shard's life: epoch after epoch, and in each the steps and their layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from divisi.cluster.dispatch.broadcast import ShardExchange
from divisi.cluster.dispatch.local import Experts
from divisi.cluster.dispatch.wire import WireFormat
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.inbox import Assignment, EpochInbox
from divisi.cluster.gang.links import shard_links
from divisi.cluster.gang.mesh import FollowerMesh
from divisi.cluster.gang.reports import EpochReports
from divisi.cluster.gang.threads import share_cores

log = logging.getLogger(__name__)


def run_steps(mesh: FollowerMesh, exchange: ShardExchange, experts: Experts, moe_layers: Sequence[int]) -> None:
    """Serve the steps of one epoch; ends by StepAborted."""
    for header in mesh.headers():
        for layer in moe_layers:
            x_TD, expert_ids_TK, gates_TK = exchange.receive(header.counts)
            exchange.reply(header.counts, experts.partial_sum(layer, x_TD, expert_ids_TK, gates_TK))


@dataclass(frozen=True, slots=True)
class ShardLoop:
    """Runs a shard in the thread that calls `run`, until the inbox is stopped."""

    experts: Experts
    moe_layers: Sequence[int]
    inbox: EpochInbox
    reports: EpochReports
    wire: WireFormat
    compute_dtype: torch.dtype
    device: torch.device
    max_tokens: int
    """Most tokens that one worker brings to a step."""
    step_deadline_s: float
    threads: int | None
    """See `GangSpec.threads`."""

    def run(self) -> None:
        """Enter the epochs that the inbox offers."""
        while not self.inbox.stopping:
            assignment = self.inbox.take()
            if assignment is None:
                self.inbox.wait()
                continue
            try:
                self._serve(assignment)
            except StepAborted as error:
                log.warning("left epoch %d: %s", assignment.membership.epoch, error)
                self.reports.left(assignment.membership.epoch, str(error))

    def _serve(self, assignment: Assignment) -> None:
        membership = assignment.membership
        self.inbox.check(membership.epoch)
        share_cores(self.threads, assignment)
        with shard_links(assignment, self.inbox, self.device) as links, torch.inference_mode():
            exchange = ShardExchange(
                links.group,
                membership.shape.attention_ranks,
                self.wire,
                self.max_tokens,
                self.step_deadline_s,
                self.device,
                self.compute_dtype,
            )
            self.reports.serving(membership.epoch)
            run_steps(links.mesh, exchange, self.experts, self.moe_layers)
