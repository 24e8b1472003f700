"""Who owns a gang dies, or its node: the gang goes on, or ends within a minute, and never another's."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.open_streams import OpenStreams, hurt_in_the_middle
from tests.support.ports import free_port
from tests.support.rounds import rounds

from .conftest import is_shard
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

RAY = Path(sys.executable).with_name("ray")
SHARD = "ExpertShardActor"
OURS = (SHARD, "CoordinatorActor", "ServeReplica:")
HOME = ("--num-cpus", "2", "--resources", '{"experts": 2}')
"""A node for shards."""
GONE_S = 60.0
_MARK = "DIVISI_TEST_NODE"
DEPLOY = """
import sys
import ray
from ray import serve
from divisi.deploy.serve_app import build

ray.init(log_to_driver=False)
serve.start(http_options={"port": PORT})
for name in sys.argv[1:]:
    args = {"model": {"model_dir": MODEL, "max_model_len": 2048, "dtype": "float32"},
            "gang": {"expert_shards": 1, "device": "cpu", "threads_per_process": 1},
            "cache": {"kv_memory": "64MiB", "max_seqs": 8},
            "mtp": {"max_draft_tokens": 0}, **PLACEMENT}
    serve.run(build(args), name=name, route_prefix=f"/{name}")
"""
DELETE = """
import sys
import ray
from ray import serve

ray.init(log_to_driver=False)
serve.delete(sys.argv[1])
"""
Record = Callable[[str, object], None]


@dataclass
class Node:
    """A `ray start --block` with a temporary folder of its own."""

    process: subprocess.Popen[bytes]
    mark: str

    def processes(self, *titles: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["environ", "cmdline", "status"]):
            if (process.info["environ"] or {}).get(_MARK) != self.mark:
                continue
            line = " ".join(process.info["cmdline"] or [])
            if process.info["status"] != psutil.STATUS_ZOMBIE and any(title in line for title in titles):
                found.append(process)
        return found


class Nodes:
    """A Ray cluster of several nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.http_port = free_port()
        self.nodes: list[Node] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def environment(self) -> dict[str, str]:
        return self._environment(0)

    def _environment(self, index: int) -> dict[str, str]:
        folder = self._folder / str(index)
        folder.mkdir(exist_ok=True)
        return os.environ | {
            "TMPDIR": str(folder), "XDG_STATE_HOME": str(folder), "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1", _MARK: f"{self._folder}/{index}",
        }  # fmt: skip

    def add(self, *flags: str, before: Sequence[str] = ()) -> Node:
        """A node; the first is the head. `before` comes before its command."""
        index = len(self.nodes)
        where = ["--address", f"127.0.0.1:{self._port}"]
        if index == 0:
            where = ["--head", "--port", str(self._port), "--include-dashboard", "false"]
        environment = self._environment(index)
        log = (self._folder / str(index) / "ray.log").open("wb")
        process = subprocess.Popen(
            [*before, RAY, "start", *where, "--block", "--disable-usage-stats", *flags],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self.nodes.append(Node(process, environment[_MARK]))
        wait_for(lambda: bool(self.nodes[index].processes("raylet/raylet")), 60, "no raylet")
        return self.nodes[index]

    def deploy(self, *names: str, placement: str = "{}") -> None:
        code = DEPLOY.replace("PORT", str(self.http_port)).replace("MODEL", repr(str(checkpoint_dir())))
        run([sys.executable, "-c", code.replace("PLACEMENT", placement), *names], self.environment)
        for name in names:
            wait_for(lambda name=name: self.is_ready(name), 90, f"{name} is not ready")  # type: ignore[misc]

    def is_ready(self, name: str) -> bool:
        try:
            return httpx.get(f"{self.url}/{name}/v1/health/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def texts(self, name: str, tokens: int, count: int = 3) -> list[str]:
        streams = OpenStreams(f"{self.url}/{name}", "divisi-demo", count, tokens)
        streams.join(120)
        assert streams.problems == []
        return streams.texts

    def processes(self, *titles: str) -> list[psutil.Process]:
        return [process for node in self.nodes for process in node.processes(*titles)]

    def close(self) -> None:
        for process in self.processes(""):
            process.kill()
        for node in self.nodes:
            node.process.wait(20)


def run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def cluster_of_nodes() -> Iterator[Nodes]:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: sockets
        nodes = Nodes(Path(folder))
        try:
            yield nodes
        finally:
            nodes.close()


def gone_after(remaining: Callable[[], list[psutil.Process]]) -> float:
    """Seconds until none of these processes is left."""
    begin = time.monotonic()
    while left := remaining():
        assert time.monotonic() - begin < GONE_S, f"left: {[process.cmdline()[:1] for process in left]}"
        time.sleep(0.2)
    return round(time.monotonic() - begin, 1)


def test_of_two_applications_of_one_model_one_is_deleted(record_result: Record) -> None:
    """The other's streams go on; of the deleted one nothing is left."""
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus", "8")
        nodes.deploy("one", "other")
        want = nodes.texts("one", 200)
        wait_for(lambda: len(nodes.processes(*OURS[:2])) == 6, 60, "not a coordinator, a shard and a spare of each")
        everybody = nodes.processes(*OURS[:2])

        def delete() -> None:
            run([sys.executable, "-c", DELETE, "other"], nodes.environment)

        gap = hurt_in_the_middle(f"{nodes.url}/one", "divisi-demo", 200, want, delete)
        record_result("application beside it deleted: longest gap", round(gap, 2))
        assert gap <= 2.0
        survivors = nodes.processes(*OURS[:2])
        assert len(survivors) == 3
        assert all(survivor in everybody for survivor in survivors)
        assert nodes.texts("one", 200) == want
        run([sys.executable, "-c", DELETE, "one"], nodes.environment)
        record_result(
            "application deleted: seconds until nothing is left", gone_after(lambda: nodes.processes(*OURS[:2]))
        )


def test_nothing_is_left_of_a_gang_without_an_owner(record_result: Record) -> None:
    """Gang and Serve's controller, which would replace it, are killed as often as they come back: the lease lapses."""
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus", "4")
        nodes.deploy("one")
        begin = time.monotonic()
        while nodes.processes(*OURS[:2]) and time.monotonic() - begin < GONE_S:
            for victim in nodes.processes("ServeController", ":Gang"):
                victim.kill()
            time.sleep(0.2)
        record_result(
            "owner gone for good: seconds until nothing is left", gone_after(lambda: nodes.processes(*OURS[:2]))
        )


def test_nothing_is_left_when_the_head_is_lost(record_result: Record) -> None:
    with cluster_of_nodes() as nodes:
        head = nodes.add("--num-cpus", "4", "--labels", "role=head")
        far = nodes.add("--num-cpus", "2", "--labels", "role=far")
        nodes.deploy("one", placement='{"placement": {"experts": {"labels": {"role": "far"}}}}')
        wait_for(lambda: len(far.processes(SHARD)) == 2, 60, "not a shard and its spare")
        for process in head.processes(""):
            process.kill()
        record_result("head lost: seconds until no shard is left elsewhere", gone_after(lambda: far.processes(*OURS)))


@pytest.mark.timeout(600)
def test_a_raylet_of_another_node_dies(record_result: Record) -> None:
    """Streams are read one after another for 60 s: no gap is long, and the old shard is gone at the end."""
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus", "8", "--labels", "role=head")
        homes, loads = [nodes.add(*HOME)], []
        gaps: list[float] = []
        head = '{"labels": {"role": "head"}}'
        placement = f'"attention": {head}, "ingress": {head}, "experts": {{"resources": {{"experts": 1}}}}'
        nodes.deploy("one", placement=f'{{"placement": {{{placement}}}}}')
        want = nodes.texts("one", 600)
        for _ in rounds(gaps):
            homes.append(nodes.add(*HOME))
            (victim,) = [home for home in homes if any(map(is_shard, home.processes(SHARD)))]
            (other,) = [home for home in homes if home is not victim]
            wait_for(lambda: bool(other.processes(SHARD)), 60, "no spare on another node")  # noqa: B023 - at once
            old, (raylet,) = victim.processes(SHARD), victim.processes("raylet/raylet")
            loads.append(round(os.getloadavg()[0], 1))
            longest, begin, blow = 0.0, time.monotonic(), raylet.kill
            while time.monotonic() - begin < 60:
                longest = max(longest, hurt_in_the_middle(f"{nodes.url}/one", "divisi-demo", 600, want, blow))
                blow = _nothing
            gaps.append(round(longest, 2))
            assert not any(process.is_running() for process in old)
            homes.remove(victim)
        record_result("raylet of another node killed: longest gaps in 60 s", gaps)
        record_result("raylet of another node killed: load average before", loads)
        assert statistics.median(gaps) <= 3.0


def _nothing() -> None:
    """More of the same streams."""


def test_nothing_is_left_when_the_driver_and_the_owner_are_killed(record_result: Record) -> None:
    with cluster_of_nodes() as nodes:
        nodes.add("--num-cpus", "4")
        flags = ["--expert-shards", "1", "--device", "cpu", "--kv-memory", "64MiB", "--max-seqs", "4"]
        flags += ["--max-model-len", "1024", "--port", str(nodes.http_port), str(checkpoint_dir())]
        command = [sys.executable, "-m", "divisi.deploy.cli", "serve", *flags]
        server = subprocess.Popen(command, env=nodes.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: httpx_ready(nodes.url), 90, "not ready")
            (keeper,) = psutil.Process(server.pid).children()
            for process in (*keeper.children(), *nodes.processes(":Gang")):
                process.kill()
            record_result(
                "driver and owner killed: seconds until nothing is left", gone_after(lambda: nodes.processes(*OURS))
            )
        finally:
            server.kill()
            server.wait(20)


def httpx_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
