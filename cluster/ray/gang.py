"""What owns a gang: creates the coordinator, the placement group and the shards, which all end with their owner.

Ray ends the actors and placement groups of a process that ends, however it ends, as long as they are not detached:
that is the whole ownership rule, and nothing here is detached.
"""

from __future__ import annotations

import importlib
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from divisi.cluster.gang.coordinator import CoordinatorStatus
from divisi.cluster.nodes import NodeChoice, empty_groups
from divisi.cluster.ray.coordinator import NAMESPACE, start_coordinator
from divisi.cluster.ray.nodes import actor_options, living_nodes
from divisi.cluster.spec import GangSpec


class GangLost(RuntimeError):
    """The coordinator is gone, or a shard for good; the owner has to be replaced."""


class GangOwner:
    """Lives in one process; `close` or the end of the process ends the gang's actors."""

    def __init__(self, spec: GangSpec) -> None:
        """Returns at once: a shard for which there is no room yet waits for it, as long as that takes."""
        self._spec = spec
        self._coordinator = start_coordinator(spec)
        self._group: PlacementGroup | None = None
        self._shards: list[ActorHandle[Any]] = []
        self._shard_seats = {str(spec.shape.seat(rank)) for rank in spec.shape.shard_ranks}
        if num_shards := len(spec.shape.shard_ranks):
            self._group = _place(spec)
            self._shards = [_start_shard(spec, index, self._group) for index in range(num_shards)]
        self._tell_unplaced()

    def check(self) -> None:
        """Raise GangLost if the coordinator has died, or a shard could not load.

        A shard that dies is no reason, since Ray restarts it; but not one whose constructor raised.
        """
        try:
            reply: Any = self._coordinator.status.remote()
            status: CoordinatorStatus = ray.get(reply, timeout=10)
        except RayActorError as error:
            raise GangLost(str(error)) from error
        if failed := [f"{who}: {text}" for who, text in status.failures.items() if who in self._shard_seats]:
            raise GangLost("; ".join(failed))
        if not status.ready:
            self._tell_unplaced()

    def _tell_unplaced(self) -> None:
        found = empty_groups(self._spec.placement, len(self._shards), living_nodes())
        self._coordinator.report_unplaced.remote("; ".join(found))

    def close(self) -> None:
        """End all actors now."""
        for actor in (*self._shards, self._coordinator):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def _place(spec: GangSpec) -> PlacementGroup:
    nodes, num_shards = spec.placement.experts, len(spec.shape.shard_ranks)
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if spec.device == "cuda" else {}) | dict(nodes.resources)
    labels = [dict(nodes.labels)] * num_shards if nodes.labels else None
    group: PlacementGroup = placement_group([bundle] * num_shards, strategy="PACK", bundle_label_selector=labels)
    return group


def _start_shard(spec: GangSpec, index: int, group: PlacementGroup) -> ActorHandle[Any]:
    # Late: the ingress imports this module too, and must not load torch, which comes with the shard.
    actor = importlib.import_module("divisi.cluster.ray.shard").ExpertShardActor
    options = {
        "num_cpus": 1,
        "num_gpus": 1 if spec.device == "cuda" else 0,
        "max_restarts": -1,
        "name": f"{spec.name}/expert:{index}",
        "namespace": NAMESPACE,
        **actor_options(NodeChoice(resources=spec.placement.experts.resources)),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }
    handle: ActorHandle[Any] = ray.remote(actor).options(**options).remote(spec, index)
    return handle
