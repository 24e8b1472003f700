"""Debian's `promtool` and `prometheus`, where they are installed (`apt-get install prometheus`)."""

from __future__ import annotations

import shutil
import subprocess

import pytest

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool: apt-get install prometheus (.ci/run does)"
)


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run it; its output and status."""
    return subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
