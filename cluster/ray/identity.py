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
    key = f"gang/{application}".encode()
    _internal_kv_put(key, secrets.token_hex(4).encode(), overwrite=False, namespace=_NAMESPACE)
    return replace(spec, name=f"{application}:{_internal_kv_get(key, namespace=_NAMESPACE).decode()}")
