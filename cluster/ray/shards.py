"""Starts the actors of expert shards, and their spares. Imports no torch, which comes with the shard."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import ray
from ray._private.state import actors, available_resources_per_node
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from divisi.cluster.nodes import NodeChoice, second_home
from divisi.cluster.ray.actors import NAMESPACE, shard_name, shards_prefix, spare_name
from divisi.cluster.ray.nodes import actor_options, living_nodes
from divisi.cluster.spec import GangSpec

log = logging.getLogger(__name__)


def start_shard(spec: GangSpec, index: int) -> None:
    """Unless it is there. Spread over the nodes: the fewer of them one node holds, the fewer go with it."""
    _start(spec, shard_name(spec, index), index, num_cpus=1, scheduling_strategy="SPREAD")


def end_surplus(spec: GangSpec, wanted: int, holders: Collection[str]) -> bool:
    """End the processes that were started for shards which there are no more; whether any is left.

    One of `holders` has another seat by now, and is left alone: it is ended when it is a spare again.
    """
    left = False
    for index, name in _shards_from(spec, wanted):
        if name in holders:
            left = True
            continue
        log.info("ending the process of expert:%d, which is not wanted any more", index)
        with contextlib.suppress(ValueError, RayError):  # it has ended meanwhile
            ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
    return left


def _shards_from(spec: GangSpec, first: int) -> list[tuple[int, str]]:
    found: list[dict[str, str]] = list_named_actors(all_namespaces=True)
    prefix = shards_prefix(spec) + "expert:"
    names = [each["name"] for each in found if each["namespace"] == NAMESPACE and each["name"].startswith(prefix)]
    shards = [(int(name.removeprefix(prefix)), name) for name in names]
    return sorted((index, name) for index, name in shards if index >= first)


def homeless(spec: GangSpec) -> list[str]:
    """For people: shards' processes that Ray has found no room for."""
    prefix, needs = shards_prefix(spec), _needs(spec)
    pending = [
        actor["Name"].removeprefix(prefix)
        for actor in actors().values()
        if actor["State"] == "PENDING_CREATION" and actor["Name"].startswith(f"{prefix}expert:")
    ]
    free = available_resources_per_node()
    if any(needs.admits(replace(node, resources=free.get(node.name, {}))) for node in living_nodes()):
        return []
    return [f"no node of the cluster has room for {who}, which takes {needs}" for who in sorted(pending)]


def start_spares(spec: GangSpec) -> None:
    """Where they are missing: on this node, and on one more, or with this node the only spare might be lost."""
    try:
        own = ray.get_runtime_context().get_node_id()
        elsewhere = second_home(own, _needs(spec), living_nodes())
        for node in (own, elsewhere) if elsewhere else (own,):
            _start_spare(spec, node)
    except Exception as error:  # noqa: BLE001 - whatever it was: without a spare the gang serves as well
        log.info("no spare yet: %s", error)


def _start_spare(spec: GangSpec, node: str) -> None:
    """It takes the place of a process whose core and memory are free then; a GPU it needs from the start, as Ray lends
    them for good."""
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    _start(spec, spare_name(spec, node), None, num_cpus=0, scheduling_strategy=there)


def _needs(spec: GangSpec) -> NodeChoice:
    """What a node must have for a shard to be on it."""
    needed = {"GPU" if spec.device == "cuda" else "CPU": 1.0, **spec.placement.experts.resources}
    return NodeChoice(spec.placement.experts.labels, needed)


def _start(spec: GangSpec, name: str, own: int | None, **options: Any) -> None:
    actor = importlib.import_module("divisi.cluster.ray.shard").ExpertShardActor
    options |= {
        "num_gpus": 1 if spec.device == "cuda" else 0,
        "max_restarts": -1,
        "lifetime": "detached",
        "name": name,
        "namespace": NAMESPACE,
        "get_if_exists": True,
        **actor_options(spec.placement.experts),
    }
    ray.remote(actor).options(**options).remote(spec, name, own)
