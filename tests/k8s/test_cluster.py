"""The presets on a cluster of several raylets, each in a network and with files of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.k8s.helm import PRESETS, ROOT, groups_of, preset, render, service_of
from tests.k8s.ray_pods import RayPods, on_this_machine, ray_pods

pytestmark = [pytest.mark.verify, pytest.mark.timeout(600)]

ACTORS = {
    "split": {"Ingress": {"ingress"}, "Gang": {"ingress"}, "CoordinatorActor": {"ingress"},
              "AttentionWorker": {"attention"}, "ExpertShardActor": {"experts"}},
    "colocated": {"Ingress": {"ingress"}, "Gang": {"ingress"}, "CoordinatorActor": {"ingress"},
                  "AttentionWorker": {"colocated"}},
}  # fmt: skip


def answer(url: str) -> str:
    body = {"model": "divisi-demo", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_serves_and_each_actor_is_in_its_group(
    name: str, tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    manifests = render(preset(name))
    config, changes = on_this_machine(yaml.safe_load(service_of(manifests)["serveConfigV2"]))
    print("\n".join(changes))
    record_result("changed for this machine", [change.replace(str(ROOT), ".") for change in changes])
    counts = {group: spec["replicas"] for group, spec in groups_of(manifests).items()}
    with ray_pods(manifests, tmp_path, counts) as cluster:
        cluster.deploy(config, tmp_path)
        for pod in cluster.pods["ingress"]:
            cluster.wait_until_ready(pod, 200)
            assert answer(pod.url)
        topology = "split" if "experts" in counts else "colocated"
        assert cluster.where() == ACTORS[topology]


class Streams:
    """Answers that are read while something happens."""

    def __init__(self, urls: list[str], tokens: int) -> None:
        self._tokens = tokens
        self.counts = [0] * len(urls)
        self.problems: list[str] = []
        self._threads = [threading.Thread(target=self._read, args=(index, url)) for index, url in enumerate(urls)]
        for thread in self._threads:
            thread.start()

    def _read(self, index: int, url: str) -> None:
        body = {"model": "divisi-demo", "prompt": f"Say {index}:", "max_tokens": self._tokens, "stream": True,
                "ignore_eos": True, "temperature": 0}  # fmt: skip
        finished = ""
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
                if reply.status_code != 200:
                    self.problems.append(f"{index}: {reply.status_code} {reply.read().decode()}")
                    return
                for line in reply.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.problems.append(f"{index}: {event['error']}")
                        return
                    self.counts[index] += 1
                    finished = event["choices"][0]["finish_reason"] or finished
        except httpx.HTTPError as error:
            self.problems.append(f"{index}: after {self.counts[index]} events: {error!r}")
            return
        if finished != "length":
            self.problems.append(f"{index}: ended with {finished!r} after {self.counts[index]} events")

    def wait_until_flowing(self, events: int, within_s: float = 60) -> None:
        until = time.monotonic() + within_s
        while min(self.counts) < events and not self.problems:
            assert time.monotonic() < until, self.counts
            time.sleep(0.05)

    def join(self, within_s: float) -> None:
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.1))
        assert not any(thread.is_alive() for thread in self._threads), self.counts


def small_cluster(tmp_path: Path, ingress: int) -> tuple[list[Any], dict[str, Any]]:
    manifests = render(preset("cpu"), {"divisi": {"http": {"ingress_replicas": ingress}, "gang": {"expert_shards": 1}}})
    config, _ = on_this_machine(yaml.safe_load(service_of(manifests)["serveConfigV2"]), shutdown_grace_s=40.0)
    return manifests, config


@pytest.mark.parametrize(
    ("group", "hook"),
    [("experts", True), ("ingress", True), ("attention", True), ("experts", False), ("attention", False)],
)
def test_a_node_that_ends_breaks_no_stream(
    group: str, hook: bool, tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    """Eight streams while a pod gets its preStop hook and SIGTERM, and another is there to take over.

    Or SIGTERM alone, as on a node whose time is up; an ingress replica's answers break then.
    """
    manifests, config = small_cluster(tmp_path, ingress=2 if group == "ingress" else 1)
    counts = {"ingress": 2 if group == "ingress" else 1, "attention": 1, "experts": 1}
    with ray_pods(manifests, tmp_path, counts) as cluster:
        cluster.deploy(config, tmp_path)
        for pod in cluster.pods["ingress"]:
            cluster.wait_until_ready(pod, 200)
        cluster.add(group)
        cluster.wait_until_nodes(2 + sum(counts.values()))
        going = the_pod_in_use(cluster, group)
        staying = next(pod for pod in cluster.pods["ingress"] if pod is not going)
        ends = [staying, going] if group == "ingress" else [staying]
        streams = Streams([pod.url for pod in ends] * (8 // len(ends)), tokens=600)
        streams.wait_until_flowing(3)
        going.terminate(within_s=90, hook=hook)
        streams.join(120)
        record_result("streams, broken", [len(streams.counts), len(streams.problems)])
        assert streams.problems == []
        assert answer_soon(staying.url, within_s=60)


def answer_soon(url: str, within_s: float) -> str:
    """A coordinator that went with the pod is started anew, and new requests hear 503 for as long as that takes."""
    until = time.monotonic() + within_s
    while True:
        try:
            return answer(url)
        except AssertionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def the_pod_in_use(cluster: RayPods, group: str) -> Any:
    """One with an actor of ours; not the one with the gang's owner, where another has an ingress too."""
    actor = {"experts": "ExpertShardActor", "ingress": "Ingress", "attention": "AttentionWorker"}[group]
    used = [pod for pod in cluster.pods[group] if actor in titles(pod)]
    return next((pod for pod in used if ":Gang" not in titles(pod)), used[0])


def titles(pod: Any) -> str:
    processes = pod.machine.inside(pod.process).children(recursive=True)
    return "\n".join(" ".join(process.cmdline()[:1]) for process in processes)


def test_an_empty_group_is_named(tmp_path: Path) -> None:
    manifests, config = small_cluster(tmp_path, ingress=1)
    with ray_pods(manifests, tmp_path, {"ingress": 1, "attention": 1}) as cluster:
        cluster.deploy(config, tmp_path)
        (pod,) = cluster.pods["ingress"]
        until, said = time.monotonic() + 200, ""
        while "placement.experts" not in said and time.monotonic() < until:
            try:
                said = httpx.get(f"{pod.url}/v1/health/ready", timeout=5).text
            except httpx.TransportError as error:
                said = repr(error)
            time.sleep(0.3)
        assert "placement.experts: no node of the cluster has the label divisi-role=experts" in said
        cluster.add("experts")
        cluster.wait_until_ready(pod, 200)  # as soon as there is a node
        assert answer(pod.url)
