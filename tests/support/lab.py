"""Machines in small: network namespaces on a bridge, each with an address, a /tmp and processes of its own.

What runs in one cannot see the others but by their addresses, as pods cannot. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil
import pytest

_NET = "10.77"
_number = count(1)


def with_caches(home: str) -> str:
    """Shell lines that give a home, which begins empty, this user's kernels, so that no machine compiles its own."""
    own = shlex.quote(str(Path.home() / ".cache" / "divisi"))
    return f"mkdir -p {home}/.cache {own} && ln -sfn {own} {home}/.cache/divisi"


@dataclass
class Machine:
    """One namespace; `log` has what its processes write."""

    name: str
    address: str
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, before: str = "true"
    ) -> subprocess.Popen[bytes]:
        """Run a command, after the shell lines `before`, with a /tmp, /run and /dev/shm that begin empty.

        /run/shared is the folder of the log. It ends with everything that it has started.
        """
        shared = f"mkdir -p /run/divisi /run/shared && mount --bind {self.log.parent} /run/shared"
        mount = "mount -t tmpfs tmpfs"
        script = (
            f"{mount} /run && {shared} && {mount} /tmp && {mount} /dev/shm && {before} && exec {shlex.join(command)}"
        )
        own = ["unshare", "-m", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c", script]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *own], env=dict(environment or os.environ),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        self.processes.append(process)
        return process

    def inside(self, process: subprocess.Popen[bytes]) -> psutil.Process:
        """The command itself, below the programs that made the namespaces."""
        found = psutil.Process(process.pid)
        while Path(found.exe()).name in ("ip", "unshare"):
            (found,) = found.children()
        return found

    def start_beside(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command in the /tmp of the machine's first; it ends with that one."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*self._enter(), *command], env=dict(environment or os.environ),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None, timeout_s: float = 60) -> str:
        """Run a command beside the machine's others, in their /tmp; returns what it prints."""
        done = subprocess.run(
            [*self._enter(), *command], env=dict(environment or os.environ), capture_output=True, text=True,
            check=False, timeout=timeout_s, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.tail()}"
        return done.stdout

    def _enter(self) -> list[str]:
        there = self.inside(self.processes[0])
        return ["nsenter", "--target", str(there.pid), "--mount", "--pid", "--net"]

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """Kill what runs here."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        self.processes.clear()


class Lab:
    """Makes machines."""

    def __init__(self, folder: Path, net: str, bridge: str) -> None:
        self._folder, self._net, self._bridge = folder, net, bridge
        self.machines: dict[str, Machine] = {}

    @property
    def own_address(self) -> str:
        """Of the test itself."""
        return f"{self._net}.1"

    def machine(self, name: str) -> Machine:
        """A new one."""
        index = len(self.machines) + 11
        space, address = f"{self._bridge}{index}", f"{self._net}.{index}"
        _ip("netns", "add", space)
        _ip("link", "add", f"{space}h", "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", f"{space}h", "master", self._bridge, "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            _ip("-n", space, "link", "set", link, "up")
        made = Machine(space, address, self._folder / f"{name}.log")
        self.machines[name] = made
        return made

    def close(self) -> None:
        """End all."""
        for machine in self.machines.values():
            machine.stop()
            _ip("netns", "del", machine.name)


@contextlib.contextmanager
def lab(folder: Path) -> Iterator[Lab]:
    """A network of machines. Skips the test where none can be made."""
    if hidden := [path for path in (sys.executable, __file__) if path.startswith(("/tmp/", "/run/"))]:
        pytest.fail(f"{hidden[0]} is not there on a machine, whose /tmp and /run are its own: use a checkout elsewhere")
    number = next(_number)
    net, bridge = f"{_NET}.{os.getpid() % 200 + number}", f"dv{os.getpid() % 10000}{number}"
    try:
        _ip("link", "add", bridge, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        pytest.skip(f"network namespaces take root and iproute2: {detail}")
    made = Lab(folder, net, bridge)
    try:
        _ip("addr", "add", f"{made.own_address}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        yield made
    finally:
        made.close()
        _ip("link", "del", bridge)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)
