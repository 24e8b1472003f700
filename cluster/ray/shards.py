"""Starts the actors of expert shards, and their spares. Imports no torch, which comes with the shard."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from divisi.cluster.nodes import NodeChoice, second_home
from divisi.cluster.ray.actors import NAMESPACE, shard_name, spare_name
from divisi.cluster.ray.nodes import actor_options, living_nodes
from divisi.cluster.spec import GangSpec

log = logging.getLogger(__name__)


def start_shard(spec: GangSpec, index: int) -> None:
    """Unless it is there. Spread over the nodes: the fewer of them one node holds, the fewer go with it."""
    _start(spec, shard_name(spec, index), index, num_cpus=1, scheduling_strategy="SPREAD")


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
