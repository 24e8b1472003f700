"""What a step takes besides weights, KV and state, against what a process really grows by."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from divisi.kernels.choice import packs_here
from divisi.model.config import ModelConfig
from divisi.model.footprint.scratch import rotation_bytes, scratch_bytes
from divisi.model.layers.rotary import Rotary
from divisi.model.placement import Role
from divisi.model.random_checkpoint import SMALL_CONFIG, write_random_checkpoint
from tests.parity.engines import CPU

ROWS = 4096
WIDE = SMALL_CONFIG | {"hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 2048, "moe_intermediate_size": 256}
STEP = f"""
import sys
from pathlib import Path
import torch
from tests.parity.engines import local_engine
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[2])
local = local_engine(
    Path(sys.argv[1]), dtype=dtype, num_pages={ROWS} // 16 + 1, page_size=16, max_seqs=2, max_step_tokens={ROWS}
)
local.greedy([[20] * 64], 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
local.greedy([[20 + i % 1000 for i in range({ROWS})]], 1)
print(peak() - before)
"""


def test_rotations_are_the_table(tmp_path: Path) -> None:
    config = write_random_checkpoint(tmp_path, tokenizer=False)
    table = Rotary(config, 77, CPU).cos_sin_PR
    assert rotation_bytes(config, 77) == table.nbytes


def test_of_qwen3_next() -> None:
    """The table is what had been overlooked."""
    assert rotation_bytes(ModelConfig.model_construct(rotary_dim=64), 262_144) == 67_108_864


@pytest.mark.verify
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_grows_by_what_is_said(tmp_path: Path, dtype: str) -> None:
    config = write_random_checkpoint(tmp_path, WIDE)
    done = subprocess.run(
        [sys.executable, "-c", STEP, str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    packed = dtype == "bfloat16" and packs_here("auto")
    said = scratch_bytes(config, Role("local", True, range(config.num_experts)), ROWS, 1, packed=packed)
    grown = int(done.stdout)
    assert 0.6 * said <= grown <= 1.25 * said, f"{said} bytes said, {grown} grown"
