"""A cluster's nodes as Ray tells them, and how Ray is told to choose among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get

from divisi.cluster.nodes import Node, NodeChoice

_V2 = (b"__autoscaler_v2_enabled", b"__autoscaler")
"""Key and namespace by which Ray's head says that the newer autoscaler runs the cluster."""
_STATUS = b"__autoscaling_status"
"""Where the older one leaves its report, and so does the monitor of a cluster without any."""
_UNMANAGED = re.compile(r"node_[0-9a-f]{56}|local\.cluster\.node")
"""What that monitor calls a kind of node."""


def living_nodes() -> list[Node]:
    """All that Ray could place something on."""
    return [Node(node["Labels"], node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]]


def actor_options(choice: NodeChoice) -> dict[str, Any]:
    """For an actor's `options`, or a replica's `ray_actor_options`."""
    options: dict[str, Any] = {}
    if choice.labels:
        options["label_selector"] = dict(choice.labels)
    if choice.resources:
        options["resources"] = dict(choice.resources)
    return options


def has_autoscaler() -> bool:
    """Whether nodes may come that the cluster does not have yet."""
    key, namespace = _V2
    if _internal_kv_get(key, namespace=namespace) == b"1":
        return True
    status = _internal_kv_get(_STATUS)
    return status is not None and _manages_nodes(json.loads(status))


def _manages_nodes(status: Mapping[str, Any]) -> bool:
    report = status.get("autoscaler_report") or {}
    return any(_UNMANAGED.fullmatch(kind) is None for kind in report.get("active_nodes") or {})
