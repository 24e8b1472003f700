"""What the chart makes of values: settings, groups, and what stands beside the service of Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from divisi.deploy.settings import Settings
from tests.k8s.helm import (
    CHART,
    PRESETS,
    Values,
    at,
    groups_of,
    helm,
    merged,
    one,
    preset,
    render,
    service_of,
    settings_of,
)  # fmt: skip
from tests.k8s.releases import (
    CUDA,
    REDIS,
    SCALING,
    container,
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_settings_are_divisis(name: str) -> None:
    """And each role's label is that of a group of pods."""
    manifests = render(preset(name))
    settings = Settings.from_args(settings_of(manifests))
    placement, groups = settings.placement, groups_of(manifests)
    assert settings.gang.device in ("cpu", "cuda")
    roles = {"ingress": placement.ingress, "attention": placement.attention, "experts": placement.experts}
    wanted = {role: place.labels for role, place in roles.items() if place is not None}
    assert sorted(wanted) == (
        ["attention", "experts", "ingress"] if settings.gang.topology == "split" else ["attention", "ingress"]
    )
    assert sorted(map(str, wanted.values())) == sorted(str(group["labels"]) for group in groups.values())


def test_every_setting_gets_through() -> None:
    """All that a value can say is in the settings that come out, and large numbers are numbers."""
    values: Values = yaml.safe_load((Path(__file__).parent / "everything.yaml").read_text(encoding="utf-8"))
    args = settings_of(render(values))
    for group, fields in values["divisi"].items():
        for field, value in fields.items():
            assert args[group][field] == value, (group, field)
    assert Settings.from_args(args).cache.kv_memory == 17179869184
    assert "17179869184" in service_of(render(values))["serveConfigV2"]


@pytest.mark.parametrize(
    ("divisi", "pods"),
    [
        ({"attention_workers": 3, "expert_shards": 5}, {"ingress": 1, "attention": 3, "experts": 5}),
        ({}, {"ingress": 1, "attention": 1, "experts": 1}),
        ({"topology": "colocated", "attention_workers": 4}, {"ingress": 1, "colocated": 4}),
        ({"topology": "local"}, {"ingress": 1, "colocated": 1}),
    ],
)  # fmt: skip
def test_the_groups_are_the_topologys(divisi: Values, pods: dict[str, int]) -> None:
    manifests = render(at("divisi.gang", divisi))
    groups = groups_of(manifests)
    assert {name: group["replicas"] for name, group in groups.items()} == pods
    for group in groups.values():  # the operator wants both where nothing scales
        assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    shape = Settings.from_args(settings_of(manifests)).gang.shape
    assert shape.size == sum(count for name, count in pods.items() if name != "ingress")


@pytest.mark.parametrize(
    ("scaling", "pods"),
    [(False, (4, 4, 4)), (True, (1, 1, 4))],
    ids=["without Ray's autoscaler", "with it"],
)
def test_pods_for_as_many_workers_as_may_come(scaling: bool, pods: tuple[int, int, int]) -> None:
    values = merged(
        at("divisi.gang", {"expert_shards": 2, "autoscaling": {"min": 2, "max": 7}}),
        at("groups.attention.ranksPerPod", 2),
        SCALING if scaling else {},
    )
    manifests = render(values)
    group = groups_of(manifests)["attention"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == pods
    assert Settings.from_args(settings_of(manifests)).gang.attention_workers == 7


@pytest.mark.parametrize(
    ("given", "scaling", "pods"),
    [({}, False, (4, 4, 4)), ({}, True, (1, 1, 4)), ({"expert_shards": 3}, True, (2, 1, 4))],
    ids=["without Ray's autoscaler", "with it", "begun with three"],
)
def test_pods_for_as_many_shards_as_may_come(
    given: dict[str, int], scaling: bool, pods: tuple[int, int, int]
) -> None:
    values = merged(
        at("divisi.gang", {"expert_autoscaling": {"min": 2, "max": 7}, **given}),
        at("groups.experts.ranksPerPod", 2),
        SCALING if scaling else {},
    )
    manifests = render(values)
    group = groups_of(manifests)["experts"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == pods
    assert Settings.from_args(settings_of(manifests)).gang.expert_shards == given.get("expert_shards", 2)


def test_a_pod_can_hold_several_ranks() -> None:
    ranks = {"attention": {"ranksPerPod": 2}, "experts": {"ranksPerPod": 4}}
    manifests = render(CUDA, at("divisi.gang", {"attention_workers": 3, "expert_shards": 8}), at("groups", ranks))
    groups = groups_of(manifests)
    assert (groups["experts"]["replicas"], groups["attention"]["replicas"]) == (2, 2)
    assert groups["experts"]["resources"] == {"CPU": "4", "GPU": "4"}
    assert container(groups["experts"]["template"])["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert groups["ingress"]["resources"] == {"CPU": "1"}


def test_nothing_of_ours_is_placed_on_the_head() -> None:
    cluster = service_of(render())["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert service_of(render())["excludeHeadPodFromServeSvc"] is True
    assert "resources" not in cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:  # either, not both
        assert group["resources"]
        assert not group["rayStartParams"]


@pytest.mark.parametrize("values", [{}, SCALING])
def test_the_autoscaler_is_the_newer_one(values: Values) -> None:
    cluster = service_of(render(values))["rayClusterConfig"]
    assert cluster.get("enableInTreeAutoscaling", False) is bool(values)
    assert cluster.get("autoscalerOptions", {}).get("version") == ("v2" if values else None)
    # Its head has the rights that KubeRay gives it; a name of our own would be without.
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert ("serviceAccountName" in head) is not bool(values)
    assert "restartPolicy" not in head


def test_ray_asks_for_a_token_and_redis_for_its_password() -> None:
    cluster = service_of(render(REDIS, at("gcsFaultTolerance.redisPassword.secretName", "redis")))["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }


def test_routes_lead_to_the_service() -> None:
    gateway = {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["h.example.org"],
    }
    ingress = {"enabled": True, "className": "haproxy", "host": "h.example.org", "tlsSecretName": "tls"}
    manifests = render(at("route", {"gateway": gateway, "ingress": ingress}))
    service = one(manifests, "Service")["metadata"]["name"]
    (rule,) = one(manifests, "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service, "port": 8000}]
    assert rule["timeouts"] == {"request": "0s"}  # a stream is as long as its answer
    (rule,) = one(manifests, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == service
    assert one(manifests, "Ingress")["spec"]["tls"] == [{"secretName": "tls", "hosts": ["h.example.org"]}]
    assert not [item for item in render() if item["kind"] in ("HTTPRoute", "Ingress")]


def test_budgets_are_the_groups() -> None:
    budgets = [item for item in render() if item["kind"] == "PodDisruptionBudget"]
    assert sorted(item["metadata"]["name"] for item in budgets) == [
        "divisi-attention",
        "divisi-experts",
        "divisi-ingress",
    ]


def test_labels_for_a_scheduler_are_on_the_service_of_ray() -> None:
    labels = one(render(at("schedulingLabels", {"kueue.x-k8s.io/queue-name": "gpus"})), "RayService")["metadata"][
        "labels"
    ]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"


def test_the_notes_have_a_call_that_works() -> None:
    notes = next(text for file, text in _texts({}).items() if file.endswith("NOTES.txt"))
    called = re.search(r"-d '(.*)'", notes)
    assert called is not None
    assert json.loads(called[1])["model"] == "divisi-demo"
    assert "Bearer" not in notes
    keyed = next(
        text for file, text in _texts(at("secrets.apiKeys.secretName", "keys")).items() if file.endswith("NOTES.txt")
    )
    assert "Bearer" in keyed


def _texts(values: Values) -> dict[str, Any]:
    rendered: dict[str, Any] = helm().Chart.load(str(CHART)).render(values, name="divisi", namespace="models")
    return rendered
