"""What a benchmark ran on: commit, processor, versions, and how fast memory was at that moment."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

_VERSIONS = ("torch", "transformers", "triton", "ray")


def describe() -> str:
    """One paragraph that names commit, machine and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"commit {commit()}; {_processor()}, {os.cpu_count()} cores, {capability}; "
        f"Python {platform.python_version()}, {versions}"
    )


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of the checkout that `folder` is in, with a mark where its files differ from it."""
    git = ["git", "-C", str(folder.resolve()), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def read_bandwidth(threads: int) -> float:
    """Bytes per second that a sum over 256 MiB reads, the best of five."""
    data = torch.ones(2**25, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = min(_timed_sum(data) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return data.nbytes / best


def _timed_sum(data: torch.Tensor) -> float:
    start = time.perf_counter()
    data.sum()
    return time.perf_counter() - start


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name', platform.machine())} (family {facts.get('cpu family', '?')})"
