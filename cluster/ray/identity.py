"""What tells one gang's processes from another's: the Serve application and an id, drawn once for a cluster."""

from __future__ import annotations

import secrets
from dataclasses import replace

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from divisi.cluster.spec import GangSpec

_NAMESPACE = b"divisi"


def named(spec: GangSpec, application: str) -> GangSpec:
    """The spec with the name of the application's gang: the same in every process, also in those that are replaced.

    Ray's head keeps the id, as long as it lives: what another cluster's head has left somewhere is never this gang's.
    """
    _internal_kv_put(_key(application), secrets.token_hex(4).encode(), overwrite=False, namespace=_NAMESPACE)
    name = gang_of(application)
    assert name is not None, "it has just been put there"
    return replace(spec, name=name)


def gang_of(application: str) -> str | None:
    """The name of an application's gang; None where the cluster has never had one."""
    drawn = _internal_kv_get(_key(application), namespace=_NAMESPACE)
    return None if drawn is None else f"{application}:{drawn.decode()}"


def _key(application: str) -> bytes:
    return f"gang/{application}".encode()
