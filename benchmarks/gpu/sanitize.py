"""The small cases once more under compute-sanitizer: accesses outside of memory, and races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

_USUAL_PLACE = "/usr/local/cuda/bin/compute-sanitizer"
_COMMAND = (sys.executable, "-m", "divisi.benchmarks.gpu", "test", "--small", "--no-sanitizer")
_SECONDS = 120
_OURS = "_fwd_kernel"
"""Ends the name of every kernel of this repository. References run torch's own, of which racecheck finds some racy."""


def sanitize() -> list[str]:
    """What memcheck and racecheck found. Says so where there is no compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which(_USUAL_PLACE)
    if tool is None:
        print("compute-sanitizer is not on this machine: neither memcheck nor racecheck was run", flush=True)
        return []
    return [failure for check in ("memcheck", "racecheck") for failure in _run(tool, check)]


def _run(tool: str, check: str) -> list[str]:
    # torch's allocator hands out parts of large blocks, in which a kernel may stray unseen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "1000", *_COMMAND]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"{check}: not done after {_SECONDS} s"]
    found = re.findall(r"=+ (\w* ?SUMMARY: .*)", done.stdout + done.stderr)
    print(f"{check}: {'; '.join(found) or 'no summary'}", flush=True)
    if done.returncode == 0:
        return []
    errors = [line for line in done.stdout.splitlines() if re.match(r"=+ (Error|Invalid|Race|    at )", line)]
    if check == "racecheck" and errors and not any(_OURS in line for line in errors):
        print(f"{check}: all of them in kernels of torch, the first: {errors[0][:160]}", flush=True)
        return []
    return [f"{check}: {'; '.join(found)}", *errors[:6]]
