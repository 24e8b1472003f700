"""What owns a gang: sees to it that there is a coordinator, and all shards.

They outlive the process that has made them, by as long as the owner's lease: the next owner adopts what it finds of its
own gang and spec, and ends the rest. Without an owner they end by themselves.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.cluster.gang.membership.status import CoordinatorStatus
from divisi.cluster.nodes import empty_groups
from divisi.cluster.ray.actors import coordinator_name, end_actors, shards_prefix
from divisi.cluster.ray.coordinator import start_coordinator
from divisi.cluster.ray.nodes import living_nodes
from divisi.cluster.ray.shard_count import kept_shard_count
from divisi.cluster.ray.shards import end_surplus, homeless, start_shard
from divisi.cluster.spec import GangSpec

log = logging.getLogger(__name__)

_KEEP_S = 5.0
_ANSWER_S = 10.0
_RETRY_S = 0.2
_REPLACE_S = 60.0


class GangLost(RuntimeError):
    """A shard is gone for good; the owner has to be replaced."""


class GangOwner:
    """Lives in one process. `close` ends the gang's actors; the end of the process leaves them to the next owner."""

    def __init__(self, spec: GangSpec) -> None:
        """Returns at once: a shard for which there is no room yet waits for it, as long as that takes."""
        self._spec = spec
        self._id = uuid.uuid4().hex
        self._least_workers = spec.min_attention_workers
        self._closed = threading.Event()
        self._coordinator = self._adopt_or_start()
        self._served, self._wanted = kept_shard_count(spec) if spec.shape.shard_ranks else (0, 0)
        """So many shards serve, and are to; `_follow` hears of others."""
        self._may_be_surplus = True
        end_actors(spec.name, but=(coordinator_name(spec.name), shards_prefix(spec)))
        self._start_shards()
        self._tell_unplaced()
        self.displaced = False
        """Whether another process has become the owner."""
        threading.Thread(target=self._keep, name="gang-lease", daemon=True).start()
        if self._wanted:
            threading.Thread(target=self._follow, name="gang-shards", daemon=True).start()

    def check(self) -> None:
        """Raise GangLost if a shard could not load; start what is missing.

        Ray starts anew what dies, but not a shard whose constructor raised.
        """
        try:
            reply: Any = self._coordinator.status.remote()
            status: CoordinatorStatus = ray.get(reply, timeout=_ANSWER_S)
        except RayActorError:
            return  # it is being started anew, by Ray or by `_keep`
        needed = {f"expert:{index}" for index in range(self._served)}
        if failed := [f"{who}: {text}" for who, text in status.failures.items() if who in needed]:
            raise GangLost("; ".join(failed))
        if not status.ready and not self.displaced:
            self._start_shards()
            self._tell_unplaced()
        if self._least_workers is not None and self._least_workers != self._spec.min_attention_workers:
            self._coordinator.bound.remote(self._least_workers)  # a coordinator that was started anew knows the spec's

    def bound(self, least_workers: int) -> None:
        """Have epochs form with so many attention workers from now on."""
        self._least_workers = least_workers
        self._coordinator.bound.remote(least_workers)

    def close(self) -> None:
        """End all actors now, unless they are another owner's."""
        self._closed.set()
        if not self.displaced:
            end_actors(self._spec.name)

    def _adopt_or_start(self) -> ActorHandle[Any]:
        """The coordinator of this spec, owned from now on; one of another spec ends, with its shards."""
        until = time.monotonic() + _REPLACE_S
        while True:
            coordinator: Any = start_coordinator(self._spec)
            try:
                if ray.get(coordinator.own.remote(self._id, self._spec.fingerprint), timeout=_REPLACE_S):
                    found: ActorHandle[Any] = coordinator
                    return found
                end_actors(self._spec.name)
            except RayActorError:
                if time.monotonic() > until:
                    raise
            self._closed.wait(_RETRY_S)  # Ray has no way to await that a name becomes free

    def _keep(self) -> None:
        """The standing call to the coordinator: renews the lease, and fails as soon as the coordinator dies."""
        while not self._closed.is_set():
            try:
                kept: Any = self._coordinator.keep.remote(self._id, _KEEP_S)
                if not ray.get(kept, timeout=_KEEP_S + _ANSWER_S):
                    self.displaced = True
                    return
            except ActorDiedError:  # for good: Ray does not start it anew
                if not self._closed.is_set():
                    self._coordinator = self._adopt_or_start()
            except (RayActorError, GetTimeoutError) as error:
                log.info("the coordinator is not there now: %s", error)
                self._closed.wait(_RETRY_S)
            except Exception:  # whatever it was: without this thread the gang would end
                log.exception("the gang's lease was not renewed")
                self._closed.wait(_RETRY_S)

    def _follow(self) -> None:
        """The other standing call: how many shards there are to be. Starts those that are missing, ends the rest."""
        while not self._closed.is_set() and not self.displaced:
            try:
                wanted: Any = self._coordinator.wanted_shards.remote(self._wanted, _KEEP_S)
                found = ray.get(wanted, timeout=_KEEP_S + _ANSWER_S)
                changed, self._wanted = found != self._wanted, found
                self._may_be_surplus = self._may_be_surplus or changed
                asked: Any = self._coordinator.scale_status.remote()
                status: ScaleStatus = ray.get(asked, timeout=_ANSWER_S)
                if changed:
                    log.info("expert shards: %d wanted, %d serve: %s", found, status.expert_shards, status.why)
                self._bring_to(status)
            except Exception as error:  # noqa: BLE001 - whatever it was: a number that was asked for is asked for again
                log.info("how many shards there are to be is not known now: %s", error)
                self._closed.wait(_RETRY_S)

    def _bring_to(self, status: ScaleStatus) -> None:
        self._served = status.expert_shards
        if self._closed.is_set() or self.displaced:
            return
        if status.waits_for:
            self._start_shards()
            self._tell_unplaced()
        elif self._may_be_surplus:
            self._may_be_surplus = end_surplus(self._spec, status.wanted, status.processes)

    def _start_shards(self) -> None:
        """Those that are not there."""
        for index in range(max(self._served, self._wanted)):
            start_shard(self._spec, index)

    def _tell_unplaced(self) -> None:
        found = empty_groups(self._spec.placement, self._wanted, living_nodes())
        self._coordinator.report_unplaced.remote("; ".join(found or homeless(self._spec)))
