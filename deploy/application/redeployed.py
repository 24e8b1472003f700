"""What an application that is about to be built anew was told when its gang began to serve."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.context import _get_global_client

from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.ray.coordinator import find_coordinator

_NAMESPACE = b"divisi"
_ANSWER_S = 5.0


def keep_told(application: str, gang: str, text: str) -> None:
    """For the gang of an application: keep what it was told, with Ray's own state."""
    _internal_kv_put(_key(application), f"{gang}\n{text}".encode(), overwrite=True, namespace=_NAMESPACE)


def told_before(args: Mapping[str, Any]) -> str | None:
    """What the application that is built with these args was told before; None where no gang of it serves now."""
    name = _being_built(args)
    kept = None if name is None else _internal_kv_get(_key(name), namespace=_NAMESPACE)
    if kept is None:
        return None
    gang, _, text = kept.decode().partition("\n")
    return text if _serves(gang) else None


def _being_built(args: Mapping[str, Any]) -> str | None:
    """Serve does not tell a builder whose it is, but keeps the config that it builds from."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    details: dict[str, Any] = ray.get(client._controller.get_serve_instance_details.remote(), timeout=_ANSWER_S)
    for name, application in details["applications"].items():
        config = application.get("deployed_app_config") or {}
        if application["status"] == "DEPLOYING" and config.get("args") == args:
            return str(name)
    return None


def _serves(gang: str) -> bool:
    with contextlib.suppress(CoordinatorLost, RayError):
        reply: Any = find_coordinator(gang).status.remote()
        return bool(ray.get(reply, timeout=_ANSWER_S).ready)
    return False


def _key(application: str) -> bytes:
    return f"told/{application}".encode()
