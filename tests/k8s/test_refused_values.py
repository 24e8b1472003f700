"""Values that the chart refuses by name, and those that it takes."""

from __future__ import annotations

import pytest

from tests.k8s.helm import (
    Values,
    at,
    merged,
    refusal,
)  # fmt: skip
from tests.k8s.releases import (
    CUDA,
    INCREMENTAL,
    PREFETCH,
    REDIS,
    SCALING,
)

REFUSED = [
    ("fullnameOverride", at("fullnameOverride", "x" * 48)),
    ("fullnameOverride", at("fullnameOverride", "4-models")),
    ("divisi.model.model_dir", merged(PREFETCH, at("divisi.model.model_dir", "/elsewhere/m"))),
    ("model.claim.name", merged(PREFETCH, at("model.source", "claim"))),
    ("model.hostPath", merged(PREFETCH, at("model.source", "hostPath"))),
    ("model.hostPath", merged(PREFETCH, at("model.source", "nodeCache"))),
    ("model.prefetch.url", merged(PREFETCH, at("model.prefetch.url", "http://x/m"))),
    ("model.prefetch.repo", merged(PREFETCH, at("model.prefetch", {"repo": "", "revision": ""}))),
    ("model.prefetch.revision", merged(PREFETCH, at("model.prefetch.revision", ""))),
    ("model/prefetch/revision", merged(PREFETCH, at("model.prefetch.revision", "main"))),
    ("groups.attention.accelerator.resource", at("divisi.gang.device", "cuda")),
    ("groups.experts.accelerator.resource", at("groups.experts.accelerator.resource", "nvidia.com/gpu")),
    ("groups.experts.maxReplicas", merged(at("groups.experts.maxReplicas", 1), at("divisi.gang.expert_shards", 2))),
    ("divisi.gang.expert_shards", at("divisi.gang", {"topology": "colocated", "expert_shards": 2})),
    ("divisi.gang.attention_workers", at("divisi.gang", {"topology": "local", "attention_workers": 2})),
    ("divisi.gang.autoscaling", at("divisi.gang", {"topology": "colocated", "autoscaling": {"max": 2}})),
    ("divisi.gang.expert_autoscaling", at("divisi.gang", {"topology": "colocated", "expert_autoscaling": {"max": 2}})),
    ("groups.experts.maxReplicas", merged(
        at("groups.experts.maxReplicas", 2), at("divisi.gang.expert_autoscaling", {"max": 3}),
    )),
    ("divisi/gang/autoscaling", at("divisi.gang.autoscaling", {"min": 0, "max": 2})),
    ("groups.attention.maxReplicas", merged(
        at("groups.attention.maxReplicas", 2), at("divisi.gang.autoscaling", {"max": 3}),
    )),
    ("groups.experts.minReplicas", at("groups.experts", {"minReplicas": 4, "maxReplicas": 3})),
    ("upgrade.deletionDelaySeconds", {
        "upgrade": {"deletionDelaySeconds": 60}, "divisi": {"limits": {"shutdown_grace_s": 31}},
    }),
    ("upgrade.type", at("upgrade", {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "g"})),
    ("upgrade.gatewayClassName", merged(INCREMENTAL, at("upgrade.gatewayClassName", ""))),
    ("upgrade.stepSizePercent", merged(INCREMENTAL, at("upgrade", {"stepSizePercent": 50, "maxSurgePercent": 40}))),
    ("upgrade/intervalSeconds", merged(INCREMENTAL, at("upgrade.intervalSeconds", 0))),
    ("gcsFaultTolerance.redisAddress", at("gcsFaultTolerance.enabled", True)),
    ("gcsFaultTolerance.redisAddress", merged(REDIS, at("gcsFaultTolerance.redisAddress", "redis"))),
    ("networkPolicy.redis", merged(REDIS, at("networkPolicy.redis", []))),
    ("head.extraEnv", merged(REDIS, at("head.extraEnv", [{"name": "RAY_REDIS_ADDRESS", "value": "x"}]))),
    ("head.extraEnv", merged(REDIS, at("head.extraEnv", [{"name": "REDIS_PASSWORD", "value": "x"}]))),
    ("head.extraEnv", merged(SCALING, at("head.extraEnv", [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]))),
    ("networkPolicy.apiServer", at("autoscaling.enabled", True)),
    (
        "divisi.auth.metrics_open",
        {"secrets": {"apiKeys": {"secretName": "k"}}, "divisi": {"auth": {"metrics_open": False}}},
    ),
    ("route.gateway.parentRefs", at("route.gateway.enabled", True)),
    ("podSecurity/runAsUser", at("podSecurity.runAsUser", 0)),
    ("rayClusterConfig", {"rayClusterConfig": {"upgradeStrategy": {}}}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "values"), REFUSED, ids=[f"{index}-{names}" for index, (names, _) in enumerate(REFUSED)]
)
def test_what_the_operator_would_refuse_is_refused_by_name(names: str, values: Values) -> None:
    assert names in refusal(values)


@pytest.mark.parametrize("values", [PREFETCH, CUDA, REDIS, SCALING, INCREMENTAL, at("fullnameOverride", "x" * 47)])
def test_what_is_refused_with_an_error_is_taken_without(values: Values) -> None:
    assert refusal(values) == ""
