"""Signals: nothing new is taken, open streams go on for the grace, the rest ends with an error event; nothing is left.

The quick tier takes three cells of the matrix of signals; the others, three times each, are in the full one.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import pytest

from tests.support.ports import free_port

from .conftest import Cluster, running_cluster

pytestmark = pytest.mark.timeout(240)

SIZES = ("--kv-memory", "32MiB", "--max-seqs", "4", "--max-model-len", "4096", "--dtype", "float32", "--device", "cpu")
TOPOLOGIES = {"local": (), "split": ("--expert-shards", "1")}
GRACE_S = 8.0
STOPPED_WITHIN_S = 10.0
"""Beyond the grace; after a kill, from the kill on."""


@dataclass
class Reader:
    """A client that reads a stream in a thread."""

    url: str
    tokens: int
    events: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    broken: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {"model": "small", "prompt": "hello", "max_tokens": self.tokens, "stream": True, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        if len(self.events) >= 5:
                            self.begun.set()
        except httpx.HTTPError as error:
            self.broken = error
        self.begun.set()

    def wait_for_tokens(self) -> None:
        """Return when the stream is under way."""
        assert self.begun.wait(60)
        assert self.broken is None
        assert len(self.events) >= 5, self.events

    def received(self) -> int:
        """Tokens that came."""
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return sum(len(choice.get("token_ids") or ()) for chunk in chunks for choice in chunk.get("choices", ()))


def config(folder: Path, grace_s: float) -> Path:
    path = folder / "divisi.toml"
    path.write_text(f"[limits]\nshutdown_grace_s = {grace_s}\n", encoding="utf-8")
    return path


def tokens_lasting(cluster: Cluster, seconds: float) -> int:
    """How many tokens take so long, by a short answer's speed."""
    body = {"model": "small", "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
    begin = time.monotonic()
    httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
    return max(int(seconds * 100 / (time.monotonic() - begin)), 50)


class Terminal:
    """A terminal, of whose foreground group the server is."""

    def __init__(self) -> None:
        self._keys, self.tty = pty.openpty()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._keys, b"\x03")

    def close(self) -> None:
        """Close the window."""
        for fd in (self._keys, self.tty):
            if fd >= 0:
                os.close(fd)
        self._keys = self.tty = -1


@contextmanager
def server(
    model: Path, folder: Path, topology: str, terminal: Terminal | None = None, grace_s: float = GRACE_S, **more: Any
) -> Iterator[Cluster]:
    """A server of that topology with that grace."""
    arguments = ("--config", str(config(folder, grace_s)), *TOPOLOGIES[topology], *SIZES)
    tty = None if terminal is None else terminal.tty
    with running_cluster(model, folder / "log.txt", *arguments, terminal=tty, **more) as cluster:
        yield cluster


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def end_of(cluster: Cluster, begin: float, within_s: float) -> float:
    """Wait for the server's end; returns the seconds since `begin`. Fails if it or a process of it lives on."""
    cluster.process.wait(max(begin + within_s - time.monotonic(), 0.1))
    _, left = psutil.wait_procs(cluster.processes(), timeout=max(begin + within_s - time.monotonic(), 0.1))
    assert not left, f"left behind: {left}"
    return time.monotonic() - begin


def to_driver(cluster: Cluster, terminal: Terminal) -> None:
    cluster.process.send_signal(signal.SIGTERM)


def to_group(cluster: Cluster, terminal: Terminal) -> None:
    """As `timeout` does: to its child, and again to the group."""
    cluster.process.send_signal(signal.SIGTERM)
    os.killpg(cluster.process.pid, signal.SIGTERM)


def to_everybody(cluster: Cluster, terminal: Terminal) -> None:
    """As systemd does without KillMode=mixed: Ray's own processes and the ranks get it, too."""
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def interrupted(cluster: Cluster, terminal: Terminal) -> None:
    terminal.interrupt()


def hung_up(cluster: Cluster, terminal: Terminal) -> None:
    terminal.close()


def killed(cluster: Cluster, terminal: Terminal) -> None:
    cluster.process.kill()


ENDINGS: tuple[Callable[[Cluster, Terminal], None], ...] = (
    to_driver, to_group, to_everybody, interrupted, hung_up, killed,
)  # fmt: skip


def check_ending(
    model: Path, folder: Path, terminal: Terminal, topology: str, end: Callable[[Cluster, Terminal], None], busy: bool
) -> float:
    """One cell of the matrix. Returns the seconds from the signal to the end."""
    status = -signal.SIGKILL if end is killed else 0
    with server(model, folder, topology, terminal, status=status) as cluster:
        reader = None
        if busy:
            count = min(tokens_lasting(cluster, 2.0), 4000)
            reader = Reader(cluster.url, count)
            reader.wait_for_tokens()
        begin = time.monotonic()
        end(cluster, terminal)
        seconds = end_of(cluster, begin, STOPPED_WITHIN_S + (0.0 if end is killed else GRACE_S))
        if reader is not None:
            reader.thread.join(10)
            assert not reader.thread.is_alive(), "the client still waits"
            if end not in (killed, to_everybody):
                assert reader.broken is None
                assert reader.events[-1] == "[DONE]"
                assert reader.received() == count
    return seconds


def test_a_signal_to_the_group_lets_an_open_stream_end_whole(small_model: Path, tmp_path: Path) -> None:
    with server(small_model, tmp_path, "split", grace_s=60.0) as cluster:
        count = min(tokens_lasting(cluster, 6.0), 4000)
        reader = Reader(cluster.url, count)
        reader.wait_for_tokens()
        os.killpg(cluster.process.pid, signal.SIGTERM)
        time.sleep(1.5)
        assert reader.thread.is_alive(), "the stream ended before the server could be asked anything"
        assert httpx.get(f"{cluster.url}/v1/health/ready", timeout=10).status_code == 503
        refused = httpx.post(f"{cluster.url}/v1/completions", json={"model": "small", "prompt": "a"}, timeout=10)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "shutting down" in refused.json()["error"]["message"]
        reader.thread.join(90)
        assert reader.broken is None
        assert reader.events[-1] == "[DONE]"
        assert reader.received() == count
        assert cluster.process.wait(30) == 0


def test_ctrl_c_in_the_terminal_ends_an_idle_server(small_model: Path, tmp_path: Path, terminal: Terminal) -> None:
    check_ending(small_model, tmp_path, terminal, "local", interrupted, busy=False)


def test_a_killed_server_leaves_nothing(small_model: Path, tmp_path: Path, terminal: Terminal) -> None:
    check_ending(small_model, tmp_path, terminal, "split", killed, busy=False)


@pytest.mark.verify
@pytest.mark.timeout(400)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "stream"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_the_matrix(
    small_model: Path,
    tmp_path: Path,
    record_result: Callable[[str, object], None],
    end: Callable[[Cluster, Terminal], None],
    topology: str,
    busy: bool,
) -> None:
    seconds = []
    for _ in range(3):
        terminal = Terminal()
        try:
            seconds.append(round(check_ending(small_model, tmp_path, terminal, topology, end, busy), 1))
        finally:
            terminal.close()
    record_result("seconds from the signal to the end", seconds)


@pytest.mark.verify
@pytest.mark.parametrize("line", [None, "Starting a Ray", "Starting 1 attention", "gang: "])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_it_starts(small_model: Path, tmp_path: Path, line: str | None, number: int) -> None:
    status = 0 if number == signal.SIGTERM else -number
    with server(small_model, tmp_path, "split", ready_within_s=0, status=status) as cluster:
        until = time.monotonic() + 60
        # The mark of the first moment: there are three processes.
        while len(cluster.processes()) < 3 if line is None else line not in cluster.log.read_text():
            assert time.monotonic() < until, cluster.log.read_text()
            time.sleep(0.02)
        begin = time.monotonic()
        os.killpg(cluster.process.pid, number)
        end_of(cluster, begin, STOPPED_WITHIN_S)
        assert "Traceback" not in cluster.log.read_text()


@pytest.mark.verify
@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_without_ray_it_ends_by_itself(small_model: Path, tmp_path: Path, process: str, stopping: bool) -> None:
    with server(small_model, tmp_path, "split", grace_s=30.0, status=0 if stopping else 1) as cluster:
        reader = Reader(cluster.url, 4000)
        reader.wait_for_tokens()
        if stopping:
            os.killpg(cluster.process.pid, signal.SIGTERM)
            time.sleep(0.5)
        (victim,) = cluster.processes(f"/{process} --")
        victim.kill()
        end_of(cluster, time.monotonic(), STOPPED_WITHIN_S)
        reader.thread.join(10)
        assert not reader.thread.is_alive()
        assert re.search(rf"^divisi: .*Ray's {process} \(pid {victim.pid}\) has ended$", cluster.log.read_text(), re.M)


@pytest.fixture
def ray_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that was there before; it must outlive every server that joins it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "7" * 64)
    ports = [free_port() for _ in range(3)]
    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
    flags = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    flags += ["--num-cpus=8", "--include-dashboard=false", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    with TemporaryDirectory(prefix="ray") as folder:  # pytest's own is too long for a socket's path
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={folder}"]
        with (tmp_path / "ray.txt").open("wb") as log:
            head = subprocess.Popen([*command, *flags], stdout=log, stderr=log, start_new_session=True)
        address = f"127.0.0.1:{ports[0]}"
        try:
            assert applications(address) == "[]"
            theirs = psutil.Process(head.pid).children()
            yield address
            assert all(process.is_running() and process.status() != "zombie" for process in theirs)
            assert head.poll() is None
        finally:
            everything = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(30)
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def applications(address: str) -> str:
    """What Serve runs there, as text; waits for the cluster."""
    code = f"""
import ray, time
from ray import serve
for _ in range(60):
    try:
        ray.init(address={address!r}, log_to_driver=False, logging_level=50)
        break
    except (ConnectionError, RuntimeError):
        time.sleep(0.5)
try:
    print(sorted(serve.status().applications))
except serve.exceptions.RayServeException:
    print([])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.verify
@pytest.mark.parametrize("victim", ["stopped", "front killed", "driver killed"])
def test_on_a_joined_cluster_only_the_application_goes(
    small_model: Path, tmp_path: Path, ray_address: str, victim: str
) -> None:
    status = {"stopped": 0, "front killed": -signal.SIGKILL, "driver killed": 1}[victim]
    with server(small_model, tmp_path, "split", status=status, ray_address=ray_address) as cluster:
        assert applications(ray_address) == "['divisi']"
        begin = time.monotonic()
        if victim == "driver killed":
            max(cluster.processes(), key=lambda process: process.memory_info().rss).kill()
        else:
            os.killpg(cluster.process.pid, signal.SIGTERM if victim == "stopped" else signal.SIGKILL)
        end_of(cluster, begin, STOPPED_WITHIN_S + (GRACE_S if victim == "stopped" else 0.0))
        assert applications(ray_address) == "[]"


@pytest.mark.parametrize("second_signal", [False, pytest.param(True, marks=pytest.mark.verify)])
def test_a_stream_that_outlasts_the_grace_ends_with_an_error_event(
    small_model: Path, tmp_path: Path, second_signal: bool
) -> None:
    arguments = ("--config", str(config(tmp_path, 60.0 if second_signal else 1.5)))
    with running_cluster(small_model, tmp_path / "log.txt", *arguments, *SIZES) as cluster:
        reader = Reader(cluster.url, 4000)
        reader.wait_for_tokens()
        begin = time.monotonic()
        cluster.process.send_signal(signal.SIGTERM)
        if second_signal:
            time.sleep(0.5)
            cluster.process.send_signal(signal.SIGTERM)
        reader.thread.join(30)
        assert reader.broken is None, "the connection was cut"
        error = json.loads(reader.events[-1])["error"]
        assert error["code"] == "shutting_down"
        assert 0 < reader.received() < 4000
        assert cluster.process.wait(30) == 0
        assert time.monotonic() - begin < 25
