"""Idle processes of Ray that have imported what a rank needs, so that one that is started anew begins with loading.

Ray keeps some idle processes on each node, and takes the one that was busy last for the next actor. What a rank imports
takes 2 s of a processor. A task that does so, again and again, leaves such a process behind; once it is there, the
task costs nothing. Where Ray takes another process after all, the rank imports by itself, as ever.
"""

from __future__ import annotations

import importlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from divisi.cluster.nodes import Node
from divisi.cluster.spec import GangSpec

_MODULES = ("divisi.cluster.ray.shard", "divisi.cluster.ray.worker")


def keep_warm(spec: GangSpec) -> None:
    """Have a process ready on each node that may take a rank; returns at once. To be called every few seconds."""
    places = spec.placement.experts, spec.placement.attention
    task: Any = ray.remote(_import_all)
    for node in ray.nodes():
        if node["Alive"] and any(place.admits(Node(node["Labels"], node["Resources"])) for place in places):
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task.options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote()


def _import_all() -> None:
    for module in _MODULES:
        importlib.import_module(module)
