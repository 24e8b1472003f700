"""Servers that join one Ray cluster: one application, one address, and nobody's work is replaced unasked."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.ports import free_port

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

SIZES = ("--kv-memory", "32MiB", "--max-seqs", "2", "--max-model-len", "1024", "--device", "cpu")
FOREIGN = """
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Foreign:
    def __call__(self, request):
        return "foreign"

ray.init(log_to_driver=False)
serve.start(http_options={"port": PORT})
serve.run(Foreign.bind(), name="divisi")
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Of processes that find a running cluster by RAY_ADDRESS; it is one of its own, with its own temporary folder."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path, for the sockets
    port = free_port()
    surroundings = os.environ | {"TMPDIR": folder, "XDG_STATE_HOME": folder, "RAY_ADDRESS": f"127.0.0.1:{port}",
                                "RAY_AUTH_MODE": "token"}  # fmt: skip
    ray = Path(sys.executable).with_name("ray")
    head = [ray, "start", "--head", "--block", "--port", str(port), "--num-cpus", "8", "--include-dashboard", "false"]
    with (Path(folder) / "head.log").open("wb") as log:
        process = subprocess.Popen([*head, "--disable-usage-stats"], env=surroundings, stdout=log, stderr=log)
    try:
        recorded = Path(folder) / "ray" / "ray_current_cluster"
        until = time.monotonic() + 60
        while not recorded.exists() and time.monotonic() < until:
            assert process.poll() is None, (Path(folder) / "head.log").read_text()
            time.sleep(0.2)
        yield surroundings
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """A `divisi serve` and what it says."""

    def __init__(self, environment: dict[str, str], *flags: str) -> None:
        command = [sys.executable, "-m", "divisi.deploy.cli", "serve", *flags]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self.said = ""

    def wait_until_ready(self) -> None:
        assert self.process.stderr is not None
        while "Ready" not in self.said:
            line = self.process.stderr.readline()
            assert line, self.said
            self.said += line

    def wait(self, status: int) -> str:
        """What it has said when it has ended, with this exit status."""
        self.said += self.process.communicate(timeout=90)[1]
        assert self.process.returncode == status, self.said
        assert "Traceback" not in self.said
        return self.said

    def named_lineage(self) -> set[int]:
        """The process that the refusal has named, and those above it."""
        named = re.search(r"by process (\d+) ", self.said)
        assert named is not None, self.said
        process = psutil.Process(int(named[1]))
        return {process.pid, *(parent.pid for parent in process.parents())}


@contextmanager
def server(environment: dict[str, str], *flags: str) -> Iterator[Server]:
    started = Server(environment, *flags)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def answers(port: int) -> bool:
    body = {"model": "small", "prompt": "hello", "max_tokens": 2}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30).status_code == 200


def test_one_server_a_cluster_until_another_may_replace_it(environment: dict[str, str], small_model: Path) -> None:
    port = free_port()
    flags = (str(small_model), "--port", str(port), *SIZES)
    with server(environment, *flags) as first:
        first.wait_until_ready()
        assert f"Joining the Ray cluster at {environment['RAY_ADDRESS']}, which the environment" in first.said
        assert f"Request log: {environment['XDG_STATE_HOME']}/divisi/serve-{port}.log\n" in first.said
        with server(environment, *flags) as second:
            assert "the application 'divisi' is run on this cluster by " in second.wait(2)
            assert first.process.pid in second.named_lineage()
        with server(environment, *flags, "--port", str(free_port())) as elsewhere:
            assert f"already listens on 127.0.0.1:{port} of this cluster" in elsewhere.wait(2)
            assert f"give --host 127.0.0.1 --port {port}" in elsewhere.said
        assert answers(port)
        assert (Path(environment["XDG_STATE_HOME"]) / "divisi" / f"serve-{port}.log").stat().st_size > 0
        with server(environment, *flags, "--replace") as third:
            assert "has taken this one's place" in first.wait(0)
            third.wait_until_ready()
            assert answers(port)
            third.process.send_signal(signal.SIGTERM)
            third.wait(0)


def test_of_two_that_join_in_the_same_second_one_serves(environment: dict[str, str], small_model: Path) -> None:
    environment = environment | {"RAY_ADDRESS": ""}  # they follow the file of `ray start`
    flags = (str(small_model), "--port", str(free_port()), *SIZES)
    with server(environment, *flags) as one, server(environment, *flags) as other:
        until = time.monotonic() + 60
        while one.process.poll() is None and other.process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        loser, winner = (one, other) if one.process.poll() is not None else (other, one)
        loser.wait(2)
        assert winner.process.pid in loser.named_lineage()
        winner.wait_until_ready()
        assert f"which the file {environment['TMPDIR']}/ray/ray_current_cluster, left by `ray start`," in winner.said
        winner.process.send_signal(signal.SIGINT)
        winner.wait(0)


def test_an_application_of_others_is_not_replaced_unasked(environment: dict[str, str], small_model: Path) -> None:
    port = free_port()
    foreign = [sys.executable, "-c", FOREIGN.replace("PORT", str(port))]
    subprocess.run(foreign, env=environment, check=True, capture_output=True, timeout=90)
    flags = (str(small_model), "--port", str(port), *SIZES)
    with server(environment, *flags) as refused:
        assert "the application 'divisi' is on this cluster already (RUNNING, deployed " in refused.wait(2)
    assert httpx.get(f"http://127.0.0.1:{port}/", timeout=30).text == "foreign"
    with server(environment, *flags, "--replace") as server_:
        server_.wait_until_ready()
        assert answers(port)
        server_.process.send_signal(signal.SIGTERM)
        server_.wait(0)
