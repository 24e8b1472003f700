"""An expert shard's life: epoch after epoch, and in each the steps, their passes and layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from divisi.cluster.dispatch.protocol import Experts, HeldExperts, Peers, ShardedMode, ShardEnd
from divisi.cluster.door import Credentials
from divisi.cluster.errors import StepAborted
from divisi.cluster.gang.control.header import Header
from divisi.cluster.gang.control.links import shard_links
from divisi.cluster.gang.loops.inbox import Assignment, EpochInbox
from divisi.cluster.gang.loops.observer import ShardObserver
from divisi.cluster.gang.loops.reports import EpochReports, level_of
from divisi.cluster.gang.loops.threads import CoreShare
from divisi.cluster.passes import Pass, PassLayers
from divisi.model.experts import LeavesNotHeld

log = logging.getLogger(__name__)


@torch.inference_mode()
def serve_steps(steps: Iterable[Iterable[Pass]], end: ShardEnd, layers: PassLayers) -> None:
    """Serve steps, each given by its passes, until there are no more. Raises StepAborted."""
    for passes in steps:
        for step_pass in passes:
            end.begin(step_pass)
            for layer in layers.of(step_pass.kind):
                end.serve(layer)


@dataclass(frozen=True, slots=True)
class ShardLoop:
    """Runs a shard in the thread that calls `run`, until the inbox is stopped."""

    experts: HeldExperts
    """Which of them are served is settled at each epoch's beginning."""
    mode: ShardedMode
    layers: PassLayers
    device: torch.device
    cores: CoreShare
    credentials: Credentials
    inbox: EpochInbox
    reports: EpochReports
    observer: ShardObserver | None = None

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
                # Its text only: whoever keeps the error keeps the epoch's transfers, and the peers' connections open.
                epoch, reason = assignment.membership.epoch, str(error)
                log.log(level_of(error), "left epoch %d: %s", epoch, reason)
                if self.observer is not None:
                    self.observer.ended(reason)
                self.reports.left(epoch, reason, error.seat)

    def _serve(self, assignment: Assignment) -> None:
        """One epoch; ends by StepAborted."""
        epoch = assignment.membership.epoch
        self.inbox.check(epoch)
        spin_s = self.cores.take(assignment)
        with shard_links(assignment, self.inbox, self.device, self.credentials, spin_s) as links:
            end = self.mode.shard_end(links.peers, self._served(links.peers))
            self.reports.serving(epoch)
            serve_steps(_observed(links.mesh.headers(), self.observer), end, self.layers)

    def _served(self, peers: Peers) -> Experts:
        try:
            return self.experts.serving(peers.layout_of(self.experts.num_leaves), peers.seat)
        except LeavesNotHeld as error:
            raise StepAborted(str(error)) from None


def _observed(headers: Iterable[Header], observer: ShardObserver | None) -> Iterator[Iterable[Pass]]:
    """The passes of each step; going on to the next one says that they have been served."""
    for header in headers:
        if observer is None:
            yield header.passes
            continue
        observer.began(header)
        yield _observed_passes(header.passes, observer) if header.trace else header.passes
        observer.ended()


def _observed_passes(passes: Iterable[Pass], observer: ShardObserver) -> Iterator[Pass]:
    for step_pass in passes:
        observer.pass_began(step_pass)
        yield step_pass
        observer.pass_ended()
