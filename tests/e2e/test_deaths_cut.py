"""A node whose packets are dropped: its shard is fenced, lives on, and comes back with the network. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.lab import Lab, Machine, lab
from tests.support.open_streams import OpenStreams, hurt_in_the_middle

from .conftest import is_shard
from .test_deaths_owners import DEPLOY
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(280)]

RAY = Path(sys.executable).with_name("ray")
TOKENS = 300
FENCED_S = 3.0


def environment(head: str) -> dict[str, str]:
    return os.environ | {"RAY_ADDRESS": f"{head}:6379", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def ray_node(made: Lab, name: str, head: str | None, *flags: str) -> Machine:
    machine = made.machine(name)
    where = ["--head", "--port=6379", "--include-dashboard=false"] if head is None else [f"--address={head}:6379"]
    start = [str(RAY), "start", *where, f"--node-ip-address={machine.address}", "--block", "--disable-usage-stats",
             "--object-store-memory=80000000", *flags]  # fmt: skip
    machine.start(start, environment(head or machine.address))
    return machine


@contextmanager
def cut(machine: Machine) -> Iterator[None]:
    """Drop every packet to it and from it, without a word to either side."""
    port = ["bridge", "link", "set", "dev", f"{machine.name}h", "state"]
    subprocess.run([*port, "0"], check=True, timeout=20)  # disabled: the bridge forwards nothing
    try:
        yield
    finally:
        subprocess.run([*port, "3"], check=True, timeout=20)


def has_raylet(machine: Machine) -> bool:
    try:
        inside = machine.inside(machine.processes[0]).children(recursive=True)
        return any("raylet/raylet" in " ".join(process.cmdline()[:1]) for process in inside)
    except (psutil.NoSuchProcess, ValueError):  # its namespaces are being made
        return False


def shard_of(machine: Machine) -> psutil.Process:
    inside = machine.inside(machine.processes[0])
    (found,) = [process for process in inside.children(recursive=True) if is_shard(process)]
    return found


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_shard_that_is_cut_off_is_fenced_and_comes_back(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    with lab(tmp_path) as made:
        head = ray_node(made, "head", None, "--num-cpus=4", "--labels=role=head")
        far = ray_node(made, "far", head.address, "--num-cpus=2", "--labels=role=far")
        url = f"http://{head.address}:8000/one"
        code = DEPLOY.replace('{"port": PORT}', '{"host": "0.0.0.0", "port": 8000}')
        code = code.replace("MODEL", repr(str(checkpoint_dir())))
        code = code.replace("PLACEMENT", '{"placement": {"experts": {"labels": {"role": "far"}}}}')
        for machine in (head, far):
            wait_for(lambda machine=machine: has_raylet(machine), 60, machine.tail())  # type: ignore[misc]
        head.run([sys.executable, "-c", code, "one"], environment(head.address), 150)
        wait_for(lambda: ready(url), 90, "not ready")
        undisturbed = OpenStreams(url, "divisi-demo", 2, TOKENS)
        undisturbed.join(120)
        shard, told = shard_of(far), {}

        def blow() -> None:
            begin = time.monotonic()
            with cut(far):
                wait_for(lambda: not ready(url), 20, "nobody notices")
                told["fenced"] = round(time.monotonic() - begin, 2)
                time.sleep(max(begin + 6.0 - time.monotonic(), 0.0))
            healed = time.monotonic()
            wait_for(lambda: ready(url), 60, "it does not come back")
            told["back"] = round(time.monotonic() - healed, 2)

        gap = hurt_in_the_middle(url, "divisi-demo", TOKENS, undisturbed.texts, blow)
        record_result("shard cut off for 6 s: seconds until fenced", told["fenced"])
        record_result("shard cut off for 6 s: seconds until back, from the network's return", told["back"])
        record_result("shard cut off for 6 s: longest gap", round(gap, 2))
        record_result("load average", round(os.getloadavg()[0], 1))
        assert told["fenced"] <= FENCED_S
        assert shard.is_running(), "it was replaced, not let in again"
