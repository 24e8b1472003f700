"""Servers on one machine have no port in common, however they end."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

from divisi.deploy.haproxy.ports import FIRST, LAST, NoPortsLeft, hold_ports

HOLD = """
from divisi.deploy.haproxy.ports import hold_ports
with hold_ports() as ports:
    print(ports.start, flush=True)
    input()
"""


def test_ranges_are_apart_and_run_out() -> None:
    with ExitStack() as held:
        taken: list[range] = []
        with suppress(NoPortsLeft):
            while len(taken) <= LAST - FIRST:
                taken.append(held.enter_context(hold_ports()))
        with pytest.raises(NoPortsLeft, match="servers run on this machine"):
            held.enter_context(hold_ports())
        used = [port for ports in taken for port in ports]
        assert len(taken) >= 2
        assert len(used) == len(set(used))
        assert min(used) >= FIRST
        assert max(used) <= LAST
    with hold_ports() as again:
        assert again in taken


def test_a_killed_holder_frees_its_range() -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = int(process.stdout.readline())
    with hold_ports() as ports:
        assert ports.start != first
    process.kill()
    process.communicate(timeout=10)
    with hold_ports() as ports:
        assert ports.start <= first
