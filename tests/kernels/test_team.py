"""Threads that meet by themselves give the bits of those that OpenMP has meet, as where processes share cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SUMS = """
import hashlib, torch
from divisi.kernels.experts.layout import Tree
from divisi.kernels.select import select_kernels
torch.manual_seed(1)
torch.set_num_threads(2)
kernels = select_kernels(torch.device("cpu"), "native")
gate_up, down = kernels.pack_experts(torch.randn(8, 512, 128).bfloat16(), torch.randn(8, 128, 256).bfloat16())
digest = hashlib.sha256()
for rows in (1, 20, 70):
    ids, gates = torch.rand(rows, 8).argsort(-1)[:, :3].int(), torch.rand(rows, 3)
    x = torch.randn(rows, 128)
    digest.update(kernels.routed_experts(x, ids, gates, Tree.of(range(8), 4), gate_up, down).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("policy", ["PASSIVE", "ACTIVE"])
def test_however_threads_wait(policy: str) -> None:
    def digest(**more: str) -> str:
        env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | more
        done = subprocess.run([sys.executable, "-c", _SUMS], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert digest(OMP_WAIT_POLICY=policy) == digest()
