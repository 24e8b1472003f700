"""`make demo`'s program, run as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.verify
@pytest.mark.timeout(400)
def test_the_demo_answers_and_leaves_nothing_behind() -> None:
    command = [sys.executable, "-m", "divisi.deploy.demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("scheduler", "mixer", "router", "dispatch", "experts", "sampling", "no process is left"):
        assert part in done.stdout
    _, call, result = done.stdout.partition("get_weather returns")
    assert "city: Lisbon" in done.stdout.partition(call)[0]
    assert "16" in result.partition("== Where the time")[0].partition("\n")[2], "the answer tells the temperature"
