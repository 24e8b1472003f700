"""A node that is about to leave the cluster: Ray places nothing more on it, and Serve moves what it runs."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private.state import actors
from ray.core.generated import autoscaler_pb2

_LOOK_EVERY_S = 0.2
_REPLICA = "SERVE_REPLICA::"


def leave(node_id: str, within_s: float) -> bool:
    """Give a node up, and wait until none of Serve's replicas is on it; False when `within_s` seconds are over before.

    Serve starts them elsewhere first, where there is room, and lets the old ones finish what they do. The head knows
    that the node ends then. Raises RuntimeError where Ray refuses.
    """
    until = time.monotonic() + within_s
    gcs: Any = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # type: ignore[attr-defined]  # C++
    accepted, refusal = gcs.drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,  # type: ignore[attr-defined]  # generated
        "this node leaves the cluster",
        int((time.time() + within_s) * 1000),
    )
    if not accepted:
        raise RuntimeError(f"Ray does not give the node up: {refusal}")
    while replicas_on(node_id):
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_EVERY_S)  # Ray has no way to await the end of another's actor
    return True


def replicas_on(node_id: str) -> list[str]:
    """Names of the replicas that live on a node."""
    return [
        actor["Name"]
        for actor in actors().values()
        if actor["State"] != "DEAD" and actor["Address"]["NodeID"] == node_id and actor["Name"].startswith(_REPLICA)
    ]
