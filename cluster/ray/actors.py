"""The named actors of a gang: detached, so that they outlive who created them, and ended by their names."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import NoReturn

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from divisi.cluster.spec import GangSpec

NAMESPACE = "divisi"
"""The Ray namespace of the named actors."""
ORPHANED_S = 30.0
"""Who has heard nothing of its owner, or of the coordinator, for so long ends itself."""
_LAST_WORD_S = 5.0


def coordinator_name(gang: str) -> str:
    """Of the actor of the gang with that name."""
    return f"{gang}/coordinator"


def shards_prefix(spec: GangSpec) -> str:
    """With which the names of all shards and spares begin; those of another spec are others."""
    return f"{spec.name}/{spec.fingerprint}/"


def shard_name(spec: GangSpec, index: int) -> str:
    """Of the actor that is created for a share of the experts."""
    return f"{shards_prefix(spec)}expert:{index}"


def spare_name(spec: GangSpec, node_id: str) -> str:
    """Of the actor of a spare, one on a node."""
    return f"{shards_prefix(spec)}spare:{node_id[:12]}"


def end_actors(gang: str, but: tuple[str, ...] = ()) -> None:
    """End all actors of a gang for good, except those whose names begin so; returns at once."""
    found: list[dict[str, str]] = list_named_actors(all_namespaces=True)
    for name in sorted(actor["name"] for actor in found if actor["namespace"] == NAMESPACE):
        if name.startswith(f"{gang}/") and not name.startswith(but):
            with contextlib.suppress(ValueError, RayError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def end_own_actor() -> NoReturn:
    """End the actor that this process is, for good; by force where Ray cannot be told. Does not return."""
    own = ray.get_runtime_context().current_actor
    threading.Thread(target=ray.kill, args=(own,), kwargs={"no_restart": True}, daemon=True).start()
    threading.Event().wait(_LAST_WORD_S)  # it ends within it, unless Ray's head is gone
    os._exit(1)
