"""Values that more than one test installs, and what is read off a pod."""

from __future__ import annotations

from tests.k8s.helm import (
    Manifest,
    at,
    merged,
)  # fmt: skip

CUDA = merged(at("divisi.gang.device", "cuda"), *(at(f"groups.{group}.accelerator.resource", "nvidia.com/gpu")
              for group in ("attention", "experts", "colocated")))  # fmt: skip
PREFETCH = {
    "model": {"source": "prefetch", "prefetch": {"repo": "o/m", "revision": "0" * 40}},
    "divisi": {"model": {"model_dir": "/models/m"}},
}
REDIS = merged(at("gcsFaultTolerance", {"enabled": True, "redisAddress": "redis:6379"}),
               at("networkPolicy.redis", [{"podSelector": {}}]))  # fmt: skip
SCALING = merged(at("autoscaling.enabled", True), at("networkPolicy.apiServer", [{"ipBlock": {"cidr": "10.0.0.1/32"}}]))
INCREMENTAL = merged(SCALING, at("upgrade", {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"}))


def container(pod: Manifest) -> Manifest:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def env(pod: Manifest) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in container(pod)["env"]}
