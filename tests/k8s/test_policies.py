"""Who reaches whom: each flow that is needed is there, its reverse and its neighbours are not."""

from __future__ import annotations

from functools import cache

import pytest

from divisi.cluster.telemetry.process import SCRAPE_PORTS
from tests.k8s.helm import Manifest, Values, at, merged, pods_of, render, settings_of
from tests.k8s.network import Pod, allowed
from tests.k8s.releases import PREFETCH

ALL = merged(
    PREFETCH,
    at("autoscaling.enabled", True),
    at("gcsFaultTolerance", {"enabled": True, "redisAddress": "redis.data:6380"}),
    at("networkPolicy", {
        "apiServer": [{"ipBlock": {"cidr": "10.96.0.1/32"}}],
        "redis": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "data"}},
                   "podSelector": {"matchLabels": {"app": "redis"}}}],
        "loadBalancer": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}],
        "telemetry": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "telemetry"}}}],
    }),
)  # fmt: skip
OTHERS = {
    "operator": Pod({"app.kubernetes.io/name": "kuberay-operator"}, "ray-system"),
    "balancer": Pod({"app": "envoy"}, "gateways"),
    "prometheus": Pod({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "dns": Pod({"k8s-app": "kube-dns"}, "kube-system"),
    "API server": Pod(namespace=None, address="10.96.0.1"),
    "redis": Pod({"app": "redis"}, "data"),
    "collector": Pod({"app": "otel"}, "telemetry"),
    "hub": Pod(namespace=None, address="203.0.113.7"),
    "stranger": Pod({"app": "shell"}, "default"),
    "neighbour": Pod({"app": "shell"}, "models"),
}
SCRAPED = range(9400, 9400 + SCRAPE_PORTS)
"""What processes listen on for Prometheus."""
INSIDE = ("head", "ingress", "attention", "experts")


@cache
def release(name: str = "divisi", source: str = "prefetch") -> tuple[list[Manifest], dict[str, Pod]]:
    """The policies of a release and its pods, with the labels that KubeRay leaves them."""
    values: Values = merged(ALL, at("model", {"source": source, "hostPath": "/srv/m"}))
    manifests = render(values, name=name)
    pods = {role: Pod(pod["metadata"]["labels"]) for role, pod in pods_of(manifests).items()}
    for item in manifests:
        if item["kind"] == "Job":
            pods["fetcher"] = Pod(item["spec"]["template"]["metadata"]["labels"])
        if item["kind"] == "Pod":
            pods["test"] = Pod(item["metadata"]["labels"])
    return [item for item in manifests if item["kind"] == "NetworkPolicy"], pods


def flows() -> list[tuple[str, str, int, str, bool]]:
    """Source, target, port, protocol, and whether it has to come about."""
    table: list[tuple[str, str, int, str, bool]] = []

    def row(source: str, target: str, open_: bool, *ports: int, protocol: str = "TCP") -> None:
        table.extend((source, target, port, protocol, open_) for port in ports)

    for source in INSIDE:
        for target in INSIDE:  # Ray's ports, the gang's, HAProxy's statistics, the replicas'
            row(source, target, True, 6379, 8000, 8265, 8404, 9101, 10001, 30001, 41234, 52365)
        row(source, "dns", True, 53)
        row(source, "dns", True, 53, protocol="UDP")
        row(source, "collector", True, 4317, 4318)
        row("prometheus", source, True, 8080, SCRAPED.start, SCRAPED[-1])
        row("prometheus", source, False, SCRAPED.start - 1, SCRAPED.stop)
        row("prometheus", source, False, 8404, 6379, 30001, 41234, 52365)
        row(source, "hub", False, 443, 80)
        row(source, "prometheus", False, 8080, 9090)
        row(source, "balancer", False, 8000)
        row(source, "operator", False, 8265)
        row(source, "API server", source == "head", 443, 6443)
        row(source, "redis", source == "head", 6380)
        row(source, "redis", False, 6379, 22)
        row("operator", source, source == "head", 8265)
        row("balancer", source, source == "ingress", 8000)
        row("balancer", source, False, 8265, 8080, 8404, 9101, SCRAPED.start, 6379, 30001, 41234, 52365)
        for outsider in ("stranger", "neighbour", "hub", "API server", "redis", "collector", "fetcher"):
            row(outsider, source, False, 8000, 8080, 8265, 8404, 9101, SCRAPED.start, 6379, 30001, 41234, 52365)
        row(source, "fetcher", False, 80, 8080)
        row("test", source, source == "ingress", 8000)
        row("test", source, False, 8265, 6379, 41234)
    row("operator", "head", True, 8000)
    row("operator", "head", False, 6379, 10001)
    row("operator", "attention", False, 8000, 41234)
    row("prometheus", "ingress", True, 8000)
    row("prometheus", "attention", False, 8000)
    row("prometheus", "head", True, 44217, 44227)
    row("prometheus", "experts", False, 44217)
    row("head", "API server", False, 22, 8080)
    row("fetcher", "hub", True, 443)
    row("fetcher", "hub", False, 80, 22)
    row("fetcher", "dns", True, 53)
    row("fetcher", "redis", False, 6380)
    row("test", "hub", False, 443)
    row("test", "dns", True, 53)
    return table


@pytest.mark.parametrize(("source", "target"), sorted({(source, target) for source, target, *_ in flows()}))
def test_flows(source: str, target: str) -> None:
    policies, pods = release()
    ends = {**OTHERS, **pods}
    wrong = [
        f"{port}/{protocol} should be {'open' if open_ else 'closed'}"
        for from_, to, port, protocol, open_ in flows()
        if (from_, to) == (source, target) and allowed(policies, ends[source], ends[target], port, protocol) != open_
    ]
    assert not wrong, wrong


def test_another_release_in_the_namespace_is_a_stranger() -> None:
    policies, pods = release()
    others_policies, others = release("second")
    for source in others:
        for target in INSIDE:
            open_ = allowed([*policies, *others_policies], others[source], pods[target], 41234)
            assert not open_, (source, target)
    assert allowed([*policies, *others_policies], others["attention"], others["experts"], 41234)


def test_nodes_that_fetch_for_themselves_reach_the_source() -> None:
    policies, pods = release(source="nodeCache")
    for role in INSIDE:
        assert allowed(policies, pods[role], OTHERS["hub"], 443)
        assert not allowed(policies, pods[role], OTHERS["hub"], 80)
        assert not allowed(policies, OTHERS["hub"], pods[role], 443)


def test_without_policies_all_is_open() -> None:
    """The evaluation itself can say yes: nothing selects a pod, so that everything comes about."""
    _, pods = release()
    assert allowed([], OTHERS["stranger"], pods["head"], 6379)


def test_processes_are_scraped_where_prometheus_may_call() -> None:
    assert settings_of(render())["telemetry"]["scrape_from_port"] == SCRAPED.start
