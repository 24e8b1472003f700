"""The coordinator as a Ray actor, and the client through which ranks call it. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RaySystemError

from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.door import Credentials
from divisi.cluster.gang.membership.coordinator import Coordinator, CoordinatorLost
from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.gang.membership.status import CoordinatorStatus, Stats
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.gang.membership.watchdog import Watchdog
from divisi.cluster.nodes import NodeChoice
from divisi.cluster.ray.actors import NAMESPACE, ORPHANED_S, coordinator_name, end_actors, end_own_actor
from divisi.cluster.ray.head import end_without_head
from divisi.cluster.ray.nodes import actor_options
from divisi.cluster.ray.secret import gang_secret
from divisi.cluster.ray.shard_count import keep_shard_count, kept_shard_count
from divisi.cluster.seats import Address, LocalProcess, Membership, Role, ScrapeTarget, Seat
from divisi.cluster.spec import GangSpec
from divisi.cluster.telemetry.context import below, parse
from divisi.cluster.telemetry.conventions import GANG_STATUS
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.ranks import show_coordinator

log = logging.getLogger(__name__)

_CALL_S = 15.0
_GATHER_S = 4.0
_HUNG_AFTER_S = 2.0
"""Sooner than a rank: its successor adopts what runs, and without one no epoch forms."""
_LOOK_EVERY_S = 1.0
_Answer = TypeVar("_Answer")


class CoordinatorActor(Coordinator):
    """Adds the store for process groups, and telemetry. Runs with one thread per blocked poll."""

    def __init__(self, spec: GangSpec) -> None:
        self._watchdog = Watchdog(hung_after_s=_HUNG_AFTER_S)
        end_without_head()
        host = ray.util.get_node_ip_address()
        self._server = StoreServer(host, Credentials(gang_secret(spec), spec.tls))
        self._spec = spec
        self._kept = served, wanted = kept_shard_count(spec)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        # Seconds as the first epoch: above every epoch of a coordinator that this one replaces.
        super().__init__(
            spec.shape if spec.shape.colocated else replace(spec.shape, expert_shards=served),
            self._server.address,
            first_epoch=int(time.time()),
            min_attention_workers=spec.min_attention_workers,
            spec=spec.fingerprint,
            gather_s=_GATHER_S if again else None,
            owner_lease_s=ORPHANED_S,
            patience=spec.patience,
            virtual_shards=spec.virtual_shards,
            copies=spec.expert_copies,
            rebalance=spec.rebalance,
            wait_rule=spec.wait_rule,
        )
        if wanted != served:
            super().scale(wanted)
        telemetry = Telemetry(spec.telemetry, "coordinator", host)
        self._tracer = telemetry.tracer
        if telemetry.port:
            self.own_target = ScrapeTarget("coordinator", 0, host, telemetry.port)
        show_coordinator(telemetry, self.numbers)
        self._gang = spec.name
        threading.Thread(target=self._end_with_the_owner, name="owner", daemon=True).start()

    def _end_with_the_owner(self) -> None:
        while not self.orphaned:
            threading.Event().wait(_LOOK_EVERY_S)  # a lease lapses without anything happening
            self._keep_count(self.scale_status())
        log.warning("the gang has no owner any more, and ends")
        with contextlib.suppress(Exception):  # whatever Ray says: each shard ends by itself, too
            end_actors(self._gang, but=(coordinator_name(self._gang),))
        end_own_actor()

    def scale(self, expert_shards: int) -> ScaleStatus:
        """See Coordinator."""
        status = super().scale(expert_shards)
        self._keep_count(status)
        return status

    def _keep_count(self, status: ScaleStatus) -> None:
        """For a coordinator in this one's place. That more or fewer serve by now may be told late."""
        if (count := (status.expert_shards, status.wanted)) != self._kept:
            keep_shard_count(self._spec, *count)
            self._kept = count

    def status(self, traceparent: str = "") -> CoordinatorStatus:
        """See Coordinator; a traced request's question gets a span."""
        parent = parse(traceparent) if traceparent else None
        if self._tracer is None or parent is None:
            return super().status()
        with self._tracer.start_as_current_span(GANG_STATUS, below(parent)):
            return super().status()


def start_coordinator(spec: GangSpec) -> ActorHandle[Any]:
    """The named actor: that which is there, or a new one. Ray starts it anew whenever it dies."""
    actor: Any = ray.remote(CoordinatorActor)
    options = {
        "name": coordinator_name(spec.name),
        "namespace": NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "max_concurrency": 4 * spec.shape.size + spec.virtual_shards + 32,  # as many shards may come
        **actor_options(NodeChoice(spec.placement.ingress.labels)),
    }
    handle: ActorHandle[Any] = actor.options(**options).remote(spec)
    return handle


def find_coordinator(name: str) -> ActorHandle[Any]:
    """The coordinator of the gang with that name. Raises CoordinatorLost while there is none."""
    try:
        handle: ActorHandle[Any] = ray.get_actor(coordinator_name(name), namespace=NAMESPACE)
    except ValueError as error:
        raise CoordinatorLost(f"the gang {name!r} has no coordinator yet") from error
    return handle


class RayCoordinatorClient:
    """Implements `CoordinatorClient` over actor calls."""

    def __init__(self, name: str) -> None:
        self._actor = find_coordinator(name)

    def join(
        self,
        holder_id: str,
        role: Role,
        address: Address,
        index: int | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> Seat | None:
        """See CoordinatorClient."""
        asked: Any = self._actor.join.remote(holder_id, role, address, index, loading, spec, held)
        seat: Seat | None = self._get(asked)
        return seat

    def resume(
        self,
        holder_id: str,
        seat: Seat,
        address: Address,
        membership: Membership | None = None,
        loading: bool = False,
        spec: str = "",
        held: frozenset[int] | None = None,
    ) -> bool:
        """See CoordinatorClient."""
        asked: Any = self._actor.resume.remote(holder_id, seat, address, membership, loading, spec, held)
        return bool(self._get(asked))

    def vacancy(self, applicant: Applicant, wait_s: float) -> Share | None:
        """See CoordinatorClient."""
        share: Share | None = self._get(self._actor.vacancy.remote(applicant, wait_s))
        return share

    def prepared(self, holder_id: str, order: int) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.prepared.remote(holder_id, order))

    def neighbours(self, host: str) -> Mapping[str, LocalProcess]:
        """See CoordinatorClient."""
        found: Mapping[str, LocalProcess] = self._get(self._actor.neighbours.remote(host))
        return found

    def ended(self, holder_id: str) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.ended.remote(holder_id))

    def loaded(self, holder_id: str) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.loaded.remote(holder_id))

    def poll(self, holder_id: str, wait_s: float, stats: Stats | None = None) -> Directive:
        """See CoordinatorClient."""
        directive: Directive = self._get(self._actor.poll.remote(holder_id, wait_s, stats))
        return directive

    def serving(self, holder_id: str, epoch: int) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.serving.remote(holder_id, epoch))

    def left(self, holder_id: str, epoch: int, reason: str, suspect: str | None = None) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.left.remote(holder_id, epoch, reason, suspect))

    def retire(self, holder_id: str) -> bool:
        """See CoordinatorClient."""
        return bool(self._get(self._actor.retire.remote(holder_id)))

    def leave(self, holder_id: str, reason: str) -> None:
        """See CoordinatorClient."""
        self._get(self._actor.leave.remote(holder_id, reason))

    def push_stats(self, holder_id: str, stats: Stats) -> None:
        """See CoordinatorClient."""
        self._actor.push_stats.remote(holder_id, stats)

    def report_progress(self, who: str, text: str) -> None:
        """Tell what a rank is doing; needs no answer."""
        self._actor.report_progress.remote(who, text)

    def report_failure(self, who: str, text: str) -> None:
        """Tell why a rank could not load."""
        self._get(self._actor.report_failure.remote(who, text))

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference, timeout=_CALL_S)
        except (RayActorError, GetTimeoutError, ObjectLostError, RaySystemError) as error:
            raise CoordinatorLost(str(error)) from error
