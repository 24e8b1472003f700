"""The post of a rank that is a Ray actor."""

from __future__ import annotations

from functools import partial

from divisi.cluster.post import Post
from divisi.cluster.ray.coordinator import RayCoordinatorClient
from divisi.cluster.ray.loading import own_host, reported
from divisi.cluster.ray.secret import gang_secret
from divisi.cluster.spec import GangSpec


def ray_post(spec: GangSpec, process: str = "") -> Post:
    """Of this process, in the gang of that spec; `process` is the name of a shard's actor."""
    connect, tell = partial(RayCoordinatorClient, spec.name), partial(reported, spec.name)
    return Post(own_host(), gang_secret(spec), connect, tell, process)
