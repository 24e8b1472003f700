"""Serve's request router for attention workers: `divisi.deploy.routing` over the replicas' reports. No torch."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from divisi.cluster.request import Request
from divisi.deploy.routing import QueuedTokens, known_reports


class QueuedTokensRouter(RequestRouter):
    """Prefers the replica with the fewest tokens to compute, of those that report.

    While none has reported, two drawn at random compete by their open requests, as is Serve's default.
    """

    def initialize_state(self, ingress_replicas: int = 1, **_: Any) -> None:
        """Called by Serve, with the kwargs of the deployment's `RequestRouterConfig`."""
        self._queues: QueuedTokens[ReplicaID] = QueuedTokens(alone=ingress_replicas == 1)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first; Serve takes the least busy of the first rank that answers."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        reports = known_reports({replica_id: replica.routing_stats for replica_id, replica in by_id.items()})
        able = [by_id[replica_id] for replica_id in reports] or candidate_replicas
        drawn = random.sample(able, min(2, len(able)))
        if pending_request is None or not reports or not pending_request.args:
            return [drawn]
        request = pending_request.args[0]
        tokens = len(request.prompt) if isinstance(request, Request) else 0
        best = self._queues.choose(reports, pending_request.metadata.internal_request_id, tokens)
        return [[by_id[best]], drawn]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request has ended, well or not."""
        self._queues.finished(internal_request_id)
