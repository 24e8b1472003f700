"""One `divisi serve` per module, as a user starts it: a child process on a free port, which must leave nothing.

It leads a process group, as under a shell or `timeout`, so that tests can signal the group.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.support.ports import free_port

_MARK = "DIVISI_TEST_CLUSTER"
_GONE_S = 5.0


@dataclass
class Cluster:
    """A running server. `health` is what the health endpoints said while it started."""

    url: str
    process: subprocess.Popen[bytes]
    mark: str
    log: Path
    ready_after_s: float = 0.0
    health: list[tuple[int, int]] = field(default_factory=list)
    """(live, ready) status codes before the first 200 of ready."""
    files_before: frozenset[Path] = field(default_factory=lambda: frozenset(files_of_servers()))
    """What others had in shared memory and among the sockets of Ray."""

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The server's processes whose title contains `title`."""
        found = []
        for process in psutil.process_iter(["environ", "cmdline", "status"]):
            if (process.info["environ"] or {}).get(_MARK) != self.mark:
                continue
            if process.info["status"] != psutil.STATUS_ZOMBIE and title in " ".join(process.info["cmdline"] or []):
                found.append(process)
        return found

    def shards(self) -> list[psutil.Process]:
        """Expert shards; not the spares, which have the same title."""
        return [process for process in self.processes("ExpertShardActor") if is_shard(process)]

    def spares(self) -> list[psutil.Process]:
        """Shards' processes that serve nothing yet."""
        return [process for process in self.processes("ExpertShardActor") if process.name() == "spare"]

    def wait_until_ready(self, timeout_s: float) -> float:
        """Poll the ready endpoint; returns the seconds it took."""
        begin = time.monotonic()
        while time.monotonic() - begin < timeout_s:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                ready = httpx.get(f"{self.url}/v1/health/ready", timeout=5).status_code
                if ready == 200:
                    return time.monotonic() - begin
                self.health.append((httpx.get(f"{self.url}/v1/health/live", timeout=5).status_code, ready))
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.1)
        raise AssertionError(f"not ready within {timeout_s} s:\n{self.log.read_text()}")


@contextmanager
def running_cluster(
    model_dir: Path, log: Path, *arguments: str, ready_within_s: float = 90.0, terminal: int | None = None,
    status: int = 0, ray_address: str = "", program: Sequence[str] = ("-m", "divisi.deploy.cli"),
) -> Iterator[Cluster]:  # fmt: skip
    """Start a server, wait until it is ready, stop it by SIGTERM, and fail if anything of it is left.

    `ready_within_s` of 0 does not wait. `terminal` becomes its controlling terminal. `status` is how it has to end.
    `ray_address` names a cluster to join. `program` is what Python runs in place of the command line of `divisi`.
    """
    port = free_port()
    mark = uuid.uuid4().hex
    command = [sys.executable, *program, "serve", str(model_dir), "--port", str(port), *arguments]
    environment = os.environ | {_MARK: mark, "RAY_ADDRESS": ray_address, "XDG_STATE_HOME": str(log.parent)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=terminal, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
    cluster = Cluster(f"http://127.0.0.1:{port}", process, mark, log)
    try:
        if ready_within_s:
            cluster.ready_after_s = cluster.wait_until_ready(ready_within_s)
        yield cluster
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == status, log.read_text()
        _, left = psutil.wait_procs(cluster.processes(), timeout=10)
        assert not left, f"left behind: {left}"
        assert_nothing_left(cluster)
    finally:
        for survivor in (process, *cluster.processes()):
            if survivor.pid and psutil.pid_exists(survivor.pid):
                survivor.kill()
        process.wait(20)


def is_shard(process: psutil.Process) -> bool:
    """Of a shard's actor: whether it serves experts."""
    return process.name().startswith("expert:")


def files_of_servers() -> set[Path]:
    """What servers put into shared memory, and the sockets of Ray's sessions."""
    return {*Path("/dev/shm").iterdir(), *Path("/tmp/ray").glob("session_[0-9]*/sockets/*")}


def assert_nothing_left(cluster: Cluster) -> None:
    """No listener, no folder of HAProxy's, and no file but of processes that live, which are others'."""
    port = httpx.URL(cluster.url).port or 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "somebody still listens"
    places = {place.parent: json.loads(place.read_text()) for place in Path("/tmp").glob("divisi-*/place.json")}
    assert not [folder for folder, place in places.items() if place["port"] == port], "left behind"
    until = time.monotonic() + _GONE_S
    while left := _files_of_nobody(cluster):
        assert time.monotonic() < until, f"left behind: {left}"
        time.sleep(0.2)


def _files_of_nobody(cluster: Cluster) -> set[Path]:
    """New files that no process has; those of another test's processes are gone a moment after these."""
    if left := files_of_servers() - cluster.files_before:
        left -= {Path(file) for process in psutil.process_iter() for file in _files(process)}
    return left


def _files(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        files = [file.path for file in (*process.open_files(), *process.memory_maps())]
        return files + [str(file.laddr) for file in process.net_connections("unix")]
    return []


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small"
    write_random_checkpoint(path, SMALL_CONFIG, seed=5)
    return path


@pytest.fixture(scope="module")
def cluster(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One attention worker and two expert shards."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    sizes = ("--kv-memory", "32MiB", "--max-seqs", "8", "--max-model-len", "1024", "--dtype", "float32")
    sizes += ("--max-queued-requests", "256")  # many streams wait at once here
    with running_cluster(small_model, log, "--expert-shards", "2", "--device", "cpu", *sizes) as cluster:
        yield cluster
