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
    for part in ("Answer:", "scheduler", "mixer", "router", "dispatch", "experts", "sampling", "no process is left"):
        assert part in done.stdout
