"""Nodes follow the queue, too: a second one comes for the worker that no node has room for, and goes after it.

Ray's fake nodes, which are raylets that its autoscaler starts and ends, in a network with files of its own.
`ray.cluster_utils.AutoscalingCluster` won't do: its start ends every Ray of the machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.lab import Machine, lab, with_caches
from tests.support.namespaces import can_unshare
from tests.support.scaling import Watch, bench

pytestmark = [
    pytest.mark.verify,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_unshare(), reason="this machine lets nobody have namespaces of his own"),
]

WITHIN_S, LOAD_S = 60.0, 30
SETTINGS = """
[gang]
expert_shards = 1
device = "cpu"
threads_per_process = 1
spare_shards = false  # or one would start on the node that is to go
[gang.autoscaling]
min = 1
max = 2
queued_tokens_per_worker = 288
upscale_delay_s = 1
downscale_delay_s = 2
[cache]
max_seqs = 3
[placement.attention.resources]
attention = 1
[http]
host = "0.0.0.0"
port = 8000
"""
FILES = {
    "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 10.0, "idle_timeout_minutes": 0.1,
    "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}  # fmt: skip
"""Of the autoscaler's configuration, what has to be there."""
NODE = {"CPU": 1, "attention": 1, "object_store_memory": 80_000_000}
ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "0",
    "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled",
}  # fmt: skip


@dataclass
class FakeCluster:
    """A head, nodes that come and go, and a server."""

    machine: Machine

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://{self.machine.address}:8000"

    def nodes(self) -> int:
        """Those that live, the head among them; 0 where Ray's dashboard does not say."""
        try:
            reply = httpx.get(f"http://{self.machine.address}:8265/nodes?view=summary", timeout=5).json()
            return sum(node["raylet"].get("state") == "ALIVE" for node in reply["data"]["summary"])
        except (httpx.HTTPError, KeyError, ValueError):
            return 0

    def is_ready(self) -> bool:
        """Whether the server is."""
        try:
            return httpx.get(f"{self.url}/v1/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, condition: Callable[[], bool], until: float, what: str) -> float:
        """When it has come to be so, in seconds of the monotonic clock."""
        while not condition():
            assert time.monotonic() < until, f"{what}\n{self.machine.tail()}"
            time.sleep(0.2)
        return time.monotonic()


def autoscaler(head: str) -> dict[str, object]:
    """The autoscaler's configuration, with its head at that address."""
    own = {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    types = {
        "ray.head.default": {"resources": {"CPU": 3}, "node_config": {}, "max_workers": 0},
        "attention": {"resources": NODE, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {"type": "fake_multinode", "gcs_address": f"{head}:6379", **own}
    return {**FILES, "provider": provider, "head_node_type": "ray.head.default", "available_node_types": types}


@contextmanager
def fake_cluster(folder: Path) -> Iterator[FakeCluster]:
    """A head with room for one attention worker, and a server that may have two. All ends with the namespaces."""
    with lab(folder) as made:
        machine, ray = made.machine("head"), Path(sys.executable).with_name("ray")
        (folder / "fake.json").write_text(json.dumps(autoscaler(machine.address)))
        (folder / "divisi.toml").write_text(SETTINGS)
        environment = {**os.environ, **ENVIRONMENT, "RAY_ADDRESS": f"{machine.address}:6379", "HOME": "/run/home"}
        head = [str(ray), "start", "--head", "--block", "--autoscaling-config=/run/shared/fake.json", "--port=6379",
                "--num-cpus=3", '--resources={"attention": 1}', f"--node-ip-address={machine.address}",
                "--dashboard-host=0.0.0.0", "--dashboard-port=8265", "--object-store-memory=80000000",
                "--disable-usage-stats"]  # fmt: skip
        # A fake node finds its address by the way out.
        before = f"ip route add default via {made.own_address} && {with_caches('/run/home')}"
        machine.start(head, {k: v for k, v in environment.items() if k != "RAY_ADDRESS"}, before)
        begun = time.monotonic()
        cluster = FakeCluster(machine)
        cluster.wait(lambda: cluster.nodes() == 1, begun + 60, "no head")
        serve = [sys.executable, "-m", "divisi.deploy.cli", "serve", str(checkpoint_dir())]
        machine.start_beside([*serve, "--config", "/run/shared/divisi.toml"], environment)
        cluster.wait(cluster.is_ready, begun + 120, "the server is not ready")
        yield cluster


def test_a_second_node_comes_with_the_queue_and_goes_after_it(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    with fake_cluster(tmp_path) as cluster:
        watch, begun = Watch(cluster.url), time.monotonic()
        until = begun + WITHIN_S
        with ThreadPoolExecutor(1) as beside:
            load = beside.submit(bench, cluster.url, tmp_path, LOAD_S, "--concurrency", "6")
            two_nodes = cluster.wait(lambda: cluster.nodes() == 2, until, "no second node")
            two_workers = cluster.wait(lambda: watch.workers() == 2, until, "no second worker")
            told = load.result()
        ended = time.monotonic()
        one_worker = cluster.wait(lambda: watch.workers() == 1, until, "the second worker stays")
        one_node = cluster.wait(lambda: cluster.nodes() == 1, until, "the second node stays")
        assert cluster.is_ready()
        watch.close()
    times = {"two nodes": two_nodes, "two workers": two_workers, "the load ends": ended, "one worker": one_worker,
             "one node": one_node}  # fmt: skip
    record_result("seconds from the load's begin", {what: round(at - begun, 1) for what, at in times.items()})
    broken = [each for each in told["records"] if each["status"] not in ("ok", "rejected")]
    assert not broken
