"""HAProxy in front of two ingress replicas: what it opens, and that clients hardly notice when a piece of it dies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.ports import listening

from .conftest import Cluster, running_cluster
from .test_serve_split import wait_for

pytestmark = pytest.mark.timeout(240)

SIZES = ("--kv-memory", "32MiB", "--max-seqs", "8", "--max-model-len", "4096", "--dtype", "float32", "--device", "cpu")
README = Path(__file__).parents[2] / "deploy" / "README.md"
BACK_S = 5.0
"""Most of it goes into the start of a Python process with Ray in it."""


@pytest.fixture(scope="module")
def front(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("front") / "log.txt"
    arguments = ("--expert-shards", "1", "--ingress-replicas", "2", "--pin-cores", *SIZES)
    with running_cluster(small_model, log, *arguments, ready_within_s=180.0) as cluster:
        yield cluster


def haproxies(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in cluster.processes() if process.name() == "haproxy"]


def manager(cluster: Cluster) -> psutil.Process:
    (found,) = cluster.processes("HAProxyManager")
    return found


def status(cluster: Cluster, timeout_s: float = 10.0) -> int:
    """Of a short answer; 0 without one."""
    body = {"model": "small", "prompt": "hello", "max_tokens": 2}
    try:
        return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=timeout_s).status_code
    except httpx.TransportError:
        return 0


def listed() -> list[tuple[str, str, str]]:
    """The table of ports in the README: what a process's title begins with, its port, its address."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", text.partition("## Ports")[2], re.M)


def title(process: psutil.Process) -> str:
    """What tells processes apart: Ray's own title, else the program, or what Python runs."""
    words = process.cmdline()
    if words[0].startswith("ray::"):
        return words[0]
    scripts = [Path(word).name for word in words[1:4] if word.endswith(".py")]
    return "divisi serve" if "divisi.deploy.cli" in words else (scripts or [Path(words[0]).name])[0]


def allows(port: str, address: str, number: int, host: str, http_port: int) -> bool:
    """Whether a row of the table is about a listener on that number and host."""
    lowest, _, highest = port.replace("http.port", str(http_port)).replace("any", "1 to 65535").partition(" to ")
    if not int(lowest) <= number <= int(highest or lowest):
        return False
    if address == "the node's":
        return host not in ("0.0.0.0", "::")
    return address == "all" or host == address.replace("http.host", "127.0.0.1")


def test_only_the_ports_of_the_readme_are_open(front: Cluster) -> None:
    table, http_port = listed(), int(front.url.rpartition(":")[2])
    processes = psutil.Process(front.process.pid).children(recursive=True)
    titles = {process.pid: title(process) for process in processes}
    unlisted = [
        f"{titles[pid]} listens on {host}:{number}"
        for pid, host, number in sorted(listening(titles))
        if not any(
            titles[pid].startswith(name) and allows(port, address, number, host, http_port)
            for name, port, address in table
        )
    ]
    assert not unlisted, "\n".join(unlisted)
    unused = [name for name, _, _ in table if not any(found.startswith(name) for found in titles.values())]
    assert not unused
    replicas = {pid for pid, name in titles.items() if name.startswith("ray::ServeReplica:divisi:Ingress")}
    assert len({pid for pid, host, _ in listening(replicas) if host == "127.0.0.1"}) == 2


def cores(pattern: str, said: str) -> set[int]:
    """Those that a line names, as in `0-3,8`."""
    found = re.search(pattern, said, re.M)
    assert found, said
    ends = [part.partition("-") for part in found[1].split(",")]
    return {core for first, _, last in ends for core in range(int(first), int(last or first) + 1)}


def test_the_machine_is_shared_out_as_it_is_said(front: Cluster) -> None:
    said = front.log.read_text()
    kept = {
        name: cores(rf"^  {who}, on cores? (.*)$", said)
        for who, name in {
            r"attention:0: \d+ threads?": "AttentionWorker",
            r"expert:0: \d+ threads?": "ExpertShardActor",
            "2 ingress replicas and HAProxy: 1 thread each": "haproxy",
        }.items()
    }
    assert not kept["AttentionWorker"] & kept["ExpertShardActor"]
    for name, own in kept.items():
        found = {"haproxy": haproxies(front), "ExpertShardActor": front.shards()}
        (process,) = found.get(name) or front.processes(name)
        assert set(process.cpu_affinity()) == own
    mine = psutil.Process().nice()  # Ray would put its workers 15 below
    assert {process.nice() for process in front.processes("ray::")} == {mine}
    (process,) = haproxies(front)
    assert process.num_threads() == 1


@pytest.mark.verify
def test_a_killed_manager_is_back_and_no_client_notices(
    front: Cluster, record_result: Callable[[str, object], None]
) -> None:
    victim, (orphan,) = manager(front), haproxies(front)
    victim.kill()
    begin, statuses = time.monotonic(), set()

    def is_back() -> bool:
        statuses.add(status(front))
        return any(process.pid != orphan.pid for process in haproxies(front))

    wait_for(is_back, 20, "no new HAProxy")
    seconds = time.monotonic() - begin
    assert statuses == {200}
    record_result("seconds", round(seconds, 1))
    assert seconds < BACK_S
    wait_for(lambda: not orphan.is_running(), 10, "the HAProxy without a manager stays")


@pytest.mark.verify
def test_a_killed_haproxy_is_back(front: Cluster, record_result: Callable[[str, object], None]) -> None:
    (victim,) = haproxies(front)
    victim.kill()
    victim.wait(5)
    begin = time.monotonic()
    wait_for(lambda: status(front) == 200, 20, "no HAProxy")
    seconds = time.monotonic() - begin
    record_result("seconds", round(seconds, 1))
    assert seconds < BACK_S


def test_a_killed_ingress_replica_is_replaced_and_the_other_answers(front: Cluster) -> None:
    victim = front.processes("Ingress")[0]
    victim.kill()
    until = time.monotonic() + 20
    while len(front.processes("Ingress")) < 2:
        assert status(front) == 200
        assert time.monotonic() < until


@pytest.mark.verify
def test_without_an_ingress_replica_clients_hear_that_in_openais_shape(small_model: Path, tmp_path: Path) -> None:
    with running_cluster(small_model, tmp_path / "log.txt", *SIZES) as cluster:
        (victim,) = cluster.processes("Ingress")
        victim.kill()
        begin, refused = time.monotonic(), 0
        while time.monotonic() - begin < 30:
            reply = httpx.post(f"{cluster.url}/v1/completions", json={"model": "small", "prompt": "a", "max_tokens": 1},
                               timeout=10)  # fmt: skip
            if reply.status_code == 200:
                break
            refused += 1
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "no_ingress"
            assert reply.headers["retry-after"] == "1"
        assert reply.status_code == 200


@pytest.mark.verify
def test_two_servers_each_have_their_own(small_model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with (
        running_cluster(small_model, folders[0] / "log.txt", *SIZES) as one,
        running_cluster(small_model, folders[1] / "log.txt", *SIZES) as other,
    ):
        ports = [{number for _, _, number in listening(process.pid for process in cluster.processes("Ingress"))}
                 for cluster in (one, other)]  # fmt: skip
        assert not ports[0] & ports[1]
        haproxies(one)[0].kill()
        assert status(other) == 200
        wait_for(lambda: status(one) == 200, 20, "no HAProxy")
