"""The pods of a rendered release as machines of a lab, each with the environment and the `ray start` of KubeRay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from divisi.model.demo import checkpoint_dir
from tests.k8s.helm import Manifest, groups_of, pods_of, service_of
from tests.support.lab import Lab, Machine, lab, with_caches

_BIN = Path(sys.executable).parent
_TOKEN = b"what KubeRay's Secret holds".hex()
_HEADERS = {"Authorization": f"Bearer {_TOKEN}"}


@dataclass
class Pod:
    """A node of the Ray cluster."""

    machine: Machine
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    manifest: Manifest
    stays: bool = True
    """Whether its end would be a fault."""

    @property
    def url(self) -> str:
        """Of its HTTP proxy."""
        return f"http://{self.machine.address}:8000"

    def terminate(self, within_s: float, hook: bool = True) -> None:
        """As the kubelet ends it: the preStop hook, unless `hook` is false, then SIGTERM to `ray start --block`."""
        self.stays = False
        command = self.manifest["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        here = self.machine.inside(self.process)
        if hook and here.is_running():
            self.machine.run([sys.executable, *command[1:]], self.environment, within_s)
        self._signal()
        self.process.wait(within_s)

    def _signal(self) -> None:
        started = [self.machine.inside(self.process)]
        started += started[0].children(recursive=True)
        for process in started:
            if "start" in process.cmdline()[:4] and "--block" in process.cmdline():
                process.send_signal(signal.SIGTERM)
                return
        raise AssertionError(f"no `ray start --block` in {[process.cmdline()[:4] for process in started]}")


@dataclass
class RayPods:
    """A cluster as KubeRay would have it."""

    lab: Lab
    manifests: list[Manifest]
    head: Pod
    pods: dict[str, list[Pod]] = field(default_factory=dict)

    def add(self, group: str) -> Pod:
        """A pod more of a group."""
        spec = groups_of(self.manifests)[group]
        params = {
            **{f"num-{kind.lower()}s": amount for kind, amount in spec["resources"].items()},
            "labels": ",".join(f"{k}={v}" for k, v in spec["labels"].items()),
        }
        pod = _start(
            self.lab, f"{group}-{len(self.pods.get(group, []))}", spec["template"], params,
            _authentication(self.manifests), self.head.machine.address,
        )  # fmt: skip
        self.pods.setdefault(group, []).append(pod)
        return pod

    def deploy(self, config: dict[str, Any], folder: Path) -> None:
        """What the operator does with `serveConfigV2`: `serve deploy` to the head's dashboard."""
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        address = f"http://{self.head.machine.address}:8265"
        environment = {**os.environ, "RAY_DASHBOARD_ADDRESS": address, **_authentication(self.manifests)}
        done = _run([str(_BIN / "serve"), "deploy", "--address", address, str(file)], environment)
        assert "Sent deploy request successfully" in done

    def wait_until_nodes(self, count: int, within_s: float = 200) -> None:
        """Until Ray's head knows so many living nodes."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            for pod in (pod for pods in self.pods.values() for pod in pods):
                assert pod.process.poll() is None or not pod.stays, pod.machine.tail()
            try:
                url = f"http://{self.head.machine.address}:8265/nodes?view=summary"
                reply = httpx.get(url, headers=_HEADERS, timeout=5).json()
                alive = [node for node in reply["data"]["summary"] if node["raylet"].get("state") == "ALIVE"]
                if len(alive) == count:
                    return
            except (httpx.HTTPError, KeyError, ValueError):
                pass  # the dashboard is starting
            time.sleep(0.3)
        raise AssertionError(f"not {count} nodes within {within_s} s: {self.head.machine.tail()}")

    def wait_until_ready(self, pod: Pod, within_s: float) -> None:
        """Until the gang serves, as seen at a pod's own port."""
        until, said = time.monotonic() + within_s, ""
        while time.monotonic() < until:
            try:
                reply = httpx.get(f"{pod.url}/v1/health/ready", timeout=5)
                said = reply.text
                if reply.status_code == 200:
                    return
            except httpx.TransportError as error:
                said = repr(error)
            time.sleep(0.2)
        raise AssertionError(f"not ready within {within_s} s: {said}\n{self.status()}\n{self.logs()}")

    def status(self) -> str:
        """What Serve says."""
        url = f"http://{self.head.machine.address}:8265/api/serve/applications/"
        return httpx.get(url, headers=_HEADERS, timeout=10).text[:6000]

    def logs(self) -> str:
        """The end of each machine's log."""
        return "\n".join(f"--- {name}\n{machine.tail()[-1500:]}" for name, machine in self.lab.machines.items())

    def where(self) -> dict[str, set[str]]:
        """Of each kind of actor of ours the groups whose pods it lives in."""
        found: dict[str, set[str]] = {}
        for group, pods in {**self.pods, "head": [self.head]}.items():
            for pod in pods:
                for process in pod.machine.inside(pod.process).children(recursive=True):
                    title = " ".join(process.cmdline()[:1])
                    for actor in ("Ingress", "AttentionWorker", "Gang", "ExpertShardActor", "CoordinatorActor"):
                        if f":{actor}" in title or f"::{actor}" in title:
                            found.setdefault(actor, set()).add(group)
        return found


def _run(command: list[str], environment: dict[str, str]) -> str:
    """What it prints; its errors where it fails."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _authentication(manifests: list[Manifest]) -> dict[str, str]:
    """What KubeRay adds to each pod's environment by `authOptions`."""
    if service_of(manifests)["rayClusterConfig"]["authOptions"]["mode"] == "disabled":
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}


def _environment(template: Manifest, head: str) -> dict[str, str]:
    told = {item["name"]: item["value"] for item in template["spec"]["containers"][0]["env"]}
    return {
        **os.environ, **told, "RAY_ADDRESS": f"{head}:6379", "PATH": f"{_BIN}:{os.environ['PATH']}",
        "RAY_GCS_SERVER_REQUEST_TIMEOUT_SECONDS": "5", "RAY_SERVE_KV_TIMEOUT_S": "5", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _start(
    lab: Lab, name: str, template: Manifest, params: dict[str, str], told: dict[str, str], head: str | None = None
) -> Pod:
    machine = lab.machine(name)
    environment = _environment(template, head or machine.address) | told
    where = ["--head", "--port=6379"] if head is None else [f"--address={head}:6379"]
    flags = [f"--{key}={value}" for key, value in params.items()]
    start = [str(_BIN / "ray"), "start", *where, *flags, f"--node-ip-address={machine.address}", "--block",
             "--disable-usage-stats", "--metrics-export-port=8080", "--dashboard-agent-listen-port=52365",
             "--object-store-memory=80000000"]  # fmt: skip
    before = with_caches(environment["HOME"])
    for item in template["spec"].get("initContainers", []):
        command = [sys.executable, *item["command"][1:], *item["args"]]
        before += " && env -u RAY_SERVE_HAPROXY_BINARY_PATH " + " ".join(command)  # an init container has its own
    return Pod(machine, machine.start(start, environment, before), environment, template)


@contextmanager
def ray_pods(manifests: list[Manifest], folder: Path, counts: dict[str, int]) -> Iterator[RayPods]:
    """The head, and so many pods of each group."""
    with lab(folder) as made:
        head_spec = service_of(manifests)["rayClusterConfig"]["headGroupSpec"]
        params = {**head_spec["rayStartParams"], "dashboard-port": "8265"}
        head = _start(made, "head", pods_of(manifests)["head"], params, _authentication(manifests))
        cluster = RayPods(made, manifests, head)
        cluster.wait_until_nodes(1)
        groups = [group for group, number in counts.items() for _ in range(number)]
        for nodes, group in enumerate(groups, start=2):
            cluster.add(group)
            cluster.wait_until_nodes(nodes)  # seven at once on two cores: each would give up after 30 s
        try:
            yield cluster
        finally:
            for pods in [[cluster.head], *cluster.pods.values()]:
                for pod in pods:
                    if not psutil.pid_exists(pod.process.pid):
                        pod.process.wait(1)


def on_this_machine(config: dict[str, Any], **sizes: Any) -> tuple[dict[str, Any], list[str]]:
    """A preset's configuration for a machine without GPUs and a small model, and each change, to be printed."""
    changed = yaml.safe_load(yaml.safe_dump(config))
    (application,) = changed["applications"]
    args, said = application["args"], []
    wanted = {
        ("gang", "device"): "cpu", ("gang", "threads_per_process"): 1, ("model", "model_dir"): str(checkpoint_dir()),
        ("cache", "kv_memory"): "64MiB", ("cache", "max_seqs"): 8, ("cache", "max_step_tokens"): 256,
        ("http", "served_model_name"): ["divisi-demo"], **{("limits", key): value for key, value in sizes.items()},
    }  # fmt: skip
    for (group, key), value in wanted.items():
        before = args.get(group, {}).get(key)
        if before != value:
            said.append(f"{group}.{key}: {before!r} -> {value!r}")
            args.setdefault(group, {})[key] = value
    return changed, said
