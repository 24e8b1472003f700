"""A machine whose packets are dropped: its shard is fenced, lives on, and comes back with the network. Needs root."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.lab import Lab, Machine, lab
from tests.support.open_streams import OpenStreams, hurt_in_the_middle
from tests.support.rounds import rounds

from .conftest import is_shard
from .test_deaths_owners import DEPLOY
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

RAY = Path(sys.executable).with_name("ray")
MODEL, TOKENS = "divisi-demo", 300
FENCED_S, CUT_S = 3.0, 6.0
Record = Callable[[str, object], None]


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


def inside(machine: Machine) -> list[psutil.Process]:
    return machine.inside(machine.processes[0]).children(recursive=True)


def spares_of(machine: Machine) -> list[psutil.Process]:
    return [process for process in inside(machine) if process.name() == "spare"]


@dataclass
class Deployed:
    """The demo model on a head and machines for its one shard."""

    url: str
    homes: list[Machine]
    texts: list[str]
    """Of undisturbed streams."""

    @property
    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    @property
    def home(self) -> tuple[Machine, psutil.Process]:
        """The machine that has the shard, and the shard."""
        found = [(home, process) for home in self.homes for process in inside(home) if is_shard(process)]
        assert len(found) == 1, f"{found} serve at once"
        return found[0]

    @property
    def other(self) -> Machine:
        """Of two, that which does not have the shard."""
        (found,) = [home for home in self.homes if home is not self.home[0]]
        return found

    def gap(self, blow: Callable[[], None]) -> float:
        """The longest of the streams beside it, whose texts are as they were."""
        return round(hurt_in_the_middle(self.url, MODEL, TOKENS, self.texts, blow), 2)

    def cut_off(self, machine: Machine) -> tuple[float, float]:
        """For a while; the seconds until it was fenced, and from the network's return until the gang is ready."""
        begin = time.monotonic()
        with cut(machine):
            while self.ready:
                assert time.monotonic() - begin < 20, "nobody notices"
                time.sleep(0.02)
            fenced_s = time.monotonic() - begin
            time.sleep(max(begin + CUT_S - time.monotonic(), 0.0))
        healed = time.monotonic()
        wait_for(lambda: self.ready, 60, "it does not come back")
        return round(fenced_s, 2), round(time.monotonic() - healed, 2)


@contextmanager
def deployed(folder: Path, homes: int, gang: str = "") -> Iterator[Deployed]:
    """`homes` machines for the shard; `gang`: more of the gang's settings, as source."""
    with lab(folder) as made:
        head = ray_node(made, "head", None, "--num-cpus=4", "--labels=role=head")
        others = [
            ray_node(made, f"home{index}", head.address, "--num-cpus=2", "--labels=role=home") for index in range(homes)
        ]
        code = DEPLOY.replace('{"port": PORT}', '{"host": "0.0.0.0", "port": 8000}')
        code = code.replace("MODEL", repr(str(checkpoint_dir()))).replace('"gang": {', f'"gang": {{{gang}')
        roles = {"ingress": "head", "attention": "head", "experts": "home"}
        placement = {"placement": {role: {"labels": {"role": where}} for role, where in roles.items()}}
        code = code.replace("PLACEMENT", repr(placement))
        for machine in (head, *others):
            wait_for(lambda machine=machine: has_raylet(machine), 60, machine.tail())  # type: ignore[misc]
        head.run([sys.executable, "-c", code, "one"], environment(head.address), 150)
        found = Deployed(f"http://{head.address}:8000/one", others, [])
        wait_for(lambda: found.ready, 90, "not ready")
        undisturbed = OpenStreams(found.url, MODEL, 2, TOKENS)
        undisturbed.join(120)
        found.texts += undisturbed.texts
        yield found


def test_a_shard_that_is_cut_off_is_fenced_and_comes_back(tmp_path: Path, record_result: Record) -> None:
    """Where there is no spare: to its own seat, as often as that happens."""
    with deployed(tmp_path, 1, '"spare_shards": False, ') as gang:
        (_, shard), told = gang.home, []
        gaps: list[float] = []
        for _ in rounds(gaps):
            gaps.append(gang.gap(lambda: told.append(gang.cut_off(gang.homes[0]))))
            assert gang.home == (gang.homes[0], shard), "another process has its seat"
        record(record_result, f"the only shard cut off for {CUT_S:g} s", told, gaps)
        assert statistics.median(fenced for fenced, _ in told) <= FENCED_S


def test_a_shard_that_is_cut_off_is_the_spare_when_it_comes_back(tmp_path: Path, record_result: Record) -> None:
    """Its seat has the spare of another machine by then; and it serves again when that one is cut off."""
    with deployed(tmp_path, 2) as gang:
        told = []
        gaps: list[float] = []
        for _ in rounds(gaps):
            machine, shard, other = *gang.home, gang.other
            wait_for(lambda: bool(spares_of(other)), 60, "no spare on the other machine")  # noqa: B023 - at once
            gaps.append(gang.gap(lambda: told.append(gang.cut_off(machine))))  # noqa: B023 - at once
            wait_for(lambda: shard in spares_of(machine), 30, "it is of no use any more")  # noqa: B023 - at once
            assert gang.home[0] is other
        record(record_result, f"shard cut off for {CUT_S:g} s, a spare elsewhere", told, gaps)
        assert statistics.median(fenced for fenced, _ in told) <= FENCED_S
        assert statistics.median(gaps) <= CUT_S - 1.0, "they waited for the network"
        for spare in spares_of(machine):
            if spare != shard:
                spare.suspend()
        gang.gap(lambda: told.append(gang.cut_off(other)))
        wait_for(lambda: is_shard(shard), 30, "another process serves")


def record(record_result: Record, what: str, told: list[tuple[float, float]], gaps: list[float]) -> None:
    record_result(f"{what}: seconds until fenced", [fenced for fenced, _ in told])
    record_result(f"{what}: seconds until ready, from the network's return", [back for _, back in told])
    record_result(f"{what}: longest gaps", gaps)
    record_result(f"{what}: load average", round(os.getloadavg()[0], 1))
