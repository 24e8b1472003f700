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
from divisi.cluster.ray.coordinator import NAMESPACE, start_coordinator
from divisi.cluster.spec import GangSpec

_PLACE_S = 600.0


class GangLost(RuntimeError):
    """The coordinator is gone, or a shard for good; the owner has to be replaced."""


class GangOwner:
    """Lives in one process; `close` or the end of the process ends the gang's actors."""

    def __init__(self, spec: GangSpec) -> None:
        self._coordinator = start_coordinator(spec)
        self._group: PlacementGroup | None = None
        self._shards: list[ActorHandle[Any]] = []
        self._shard_seats = {str(spec.shape.seat(rank)) for rank in spec.shape.shard_ranks}
        if num_shards := len(spec.shape.shard_ranks):
            self._group = _place(spec)
            self._shards = [_start_shard(spec, index, self._group) for index in range(num_shards)]

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

    def close(self) -> None:
        """End all actors now."""
        for actor in (*self._shards, self._coordinator):
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def _place(spec: GangSpec) -> PlacementGroup:
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if spec.device == "cuda" else {})
    group: PlacementGroup = placement_group([bundle] * len(spec.shape.shard_ranks), strategy="PACK")
    ray.get(group.ready(), timeout=_PLACE_S)
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
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }
    handle: ActorHandle[Any] = ray.remote(actor).options(**options).remote(spec, index)
    return handle
