"""The shipped configurations of HAProxy and nginx before two gangs, one of which drains and is replaced."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from divisi.deploy.haproxy.environment import find_binary
from tests.support.lab import Lab, Machine, lab, with_caches

pytestmark = [pytest.mark.verify, pytest.mark.timeout(600)]

STREAMS, AT_ONCE, TOKENS = 200, 32, 24
_DIVISI = [sys.executable, "-P", "-m", "divisi.deploy.cli"]
_SIZES = ["--kv-memory", "64MiB", "--max-seqs", "32", "--device", "cpu", "--threads-per-process", "1"]


class Gang:
    """A `divisi serve` on a machine of its own, which can be replaced."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self._folder = folder
        self._count = 0
        self.start()

    def start(self) -> None:
        self._count += 1
        name = f"{self.machine.log.stem}-{self._count}.requests"
        self.requests = self._folder / name
        environment = {**os.environ, "RAY_ADDRESS": "local", "HOME": "/tmp/home", "OMP_NUM_THREADS": "1"}
        address = ["--host", "0.0.0.0", "--port", "8000", "--max-queued-requests", "64"]
        command = [*_DIVISI, "serve", *address, *_SIZES, "--log-file", f"/run/shared/{name}"]
        self.process = self.machine.start(command, environment, with_caches("/tmp/home"))

    def drain(self) -> None:
        """SIGTERM to the server; returns at once."""
        self.machine.inside(self.process).send_signal(signal.SIGTERM)

    def wait_until_ready(self, within_s: float = 220) -> None:
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            assert self.process.poll() is None, self.machine.tail()
            try:
                if httpx.get(f"http://{self.machine.address}:8000/v1/health/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
        raise AssertionError(f"not ready within {within_s} s: {self.machine.tail()}")

    def answered(self) -> list[int]:
        """Statuses of the completions that it was asked for."""
        lines = [json.loads(line) for line in self.requests.read_text().splitlines()] if self.requests.exists() else []
        return [line["status"] for line in lines if line.get("path") == "/v1/completions"]


def with_gangs(text: str, gangs: list[Gang]) -> str:
    """A shipped configuration, for these gangs."""
    for named, gang in zip(("10.0.0.11", "10.0.0.12"), gangs, strict=True):
        assert f"{named}:8000" in text
        text = text.replace(named, gang.machine.address)
    return text


@contextmanager
def balancer(kind: str, made: Lab, folder: Path, gangs: list[Gang]) -> Iterator[str]:
    """Its URL."""
    file = "haproxy.cfg" if kind == "haproxy" else "nginx.conf"
    (folder / file).write_text(with_gangs((files("divisi.deploy") / "examples" / file).read_text(), gangs))
    machine = made.machine("balancer")
    if kind == "haproxy":
        command = [shutil.which("haproxy") or find_binary(), "-db", "-f", f"/run/shared/{file}"]
    else:
        if (nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
            pytest.skip("no nginx: install Debian's nginx-light")
        command = [nginx, "-c", f"/run/shared/{file}", "-e", "/dev/stderr", "-g", "daemon off; pid /tmp/nginx.pid;"]
    machine.start(command, before="mkdir -p /tmp/nginx")
    url = f"http://{machine.address}:8080"
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/v1/health/ready", timeout=5).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    else:
        raise AssertionError(machine.tail())
    yield url


def read_stream(client: httpx.Client, url: str, index: int, begun: threading.Semaphore) -> str:
    """Empty, or what was wrong."""
    body = {
        "model": "divisi-demo",
        "prompt": f"Count {index}:",
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    finished, events = "", 0
    begun.release()
    try:
        with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                return f"{index}: {reply.status_code} {reply.read().decode()[:200]}"
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return f"{index}: {event['error']}"
                    events += 1
                    finished = event["choices"][0]["finish_reason"] or finished
    except httpx.HTTPError as error:
        return f"{index}: broken after {events} events: {error!r}"
    return "" if finished == "length" else f"{index}: ended by {finished!r} after {events} events"


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_gang_is_replaced_under_streams(
    kind: str, tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    """200 streams, 32 at once: none fails or breaks."""
    with lab(tmp_path) as made:
        gangs = [Gang(made.machine(name), tmp_path) for name in ("one", "two")]
        for gang in gangs:
            gang.wait_until_ready()
        begun = threading.Semaphore(0)
        with balancer(kind, made, tmp_path, gangs) as url, httpx.Client(timeout=120) as client:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                reading = [pool.submit(read_stream, client, url, index, begun) for index in range(STREAMS)]
                for _ in range(STREAMS // 4):  # a quarter has begun
                    assert begun.acquire(timeout=60)
                gangs[0].drain()
                first = gangs[0].requests
                assert gangs[0].process.wait(60) == 0, gangs[0].machine.tail()
                gangs[0].machine.processes.clear()
                gangs[0].start()
                problems = [problem for future in reading if (problem := future.result(200))]
            assert problems == []
            gangs[0].wait_until_ready()
            time.sleep(1.5)  # two checks of the balancer's, or the end of nginx's fail_timeout
            named = client.get(f"{url}/v1/models", headers={"X-Request-Id": f"{kind}-7"})
            assert named.headers["X-Request-Id"] == f"{kind}-7"
            more = [read_stream(client, url, STREAMS + index, begun) for index in range(8)]
        assert [problem for problem in more if problem] == []
        new = gangs[0].answered()
        gangs[0].requests, replaced = first, gangs[0].requests
        old = gangs[0].answered()
        gangs[0].requests = replaced
        record_result("answers of the old gang, the other, the new one", [len(old), len(gangs[1].answered()), len(new)])
        assert old.count(200) > 0
        assert new.count(200) > 0
        if kind == "haproxy":  # its checks know beforehand; nginx asks, hears 503, and asks the other
            assert set(new) == {200}
