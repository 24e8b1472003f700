"""How many expert shards a gang has and is to have: Ray's head keeps it, for coordinators that are started anew."""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from divisi.cluster.spec import GangSpec

_NAMESPACE = b"divisi"


def keep_shard_count(spec: GangSpec, served: int, wanted: int) -> None:
    """Of a gang that was told that spec: so many serve, so many are to."""
    _internal_kv_put(_key(spec), f"{served} {wanted}".encode(), overwrite=True, namespace=_NAMESPACE)


def kept_shard_count(spec: GangSpec) -> tuple[int, int]:
    """As many serve, and are to; the spec's own where nobody has asked for others."""
    kept = _internal_kv_get(_key(spec), namespace=_NAMESPACE)
    if kept is None:
        return spec.shape.expert_shards, spec.shape.expert_shards
    served, wanted = map(int, kept.decode().split())
    return served, wanted


def _key(spec: GangSpec) -> bytes:
    return f"shards/{spec.name}/{spec.fingerprint}".encode()
