"""The Triton kernels without a GPU: in the interpreter, and compiled for each chip. Both need processes of their own.

What they cannot show (speed, races within a program, the bits of a real machine) `make gpu-test` does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from divisi.benchmarks.gpu.stub_driver import SHARED_MEMORY
from divisi.kernels.gpu.chip import Chip
from tests.support.kernel_report import resident_blocks
from tests.support.resources import wrong_instructions

ROOT = Path(__file__).parent.parent.parent
MAY_SPILL = {
    (80, "gated_delta_output_fwd_kernel"): 24,
    (90, "attention_prefill_fwd_kernel"): 56,  # measured: a quarter faster than the tiles that do not
    (90, "gated_delta_chunk_fwd_kernel"): 56,  # measured: 3 % of a prefill faster than two programs a multiprocessor
    (100, "experts_up_fwd_kernel"): 8,
}
"""Bytes of a thread, at most 64."""
INTERPRETED = Path(__file__).parent / "interpreted"


@pytest.mark.timeout(400)  # a process for all of them
def test_in_the_interpreter() -> None:
    interpret("not verify", INTERPRETED)


@pytest.mark.verify
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("test_addresses", ""), ("test_bytes", ""), ("test_operations", ""), ("test_padding", ""),
        ("test_model", "not whole"), ("test_model", "whole and local"), ("test_model", "whole and split"),
    ],
)  # fmt: skip
def test_more_in_the_interpreter(file: str, named: str, record_result: Callable[[str, object], None]) -> None:
    for line in interpret("verify", INTERPRETED / f"{file}.py", named).splitlines():
        if "from the oracle" in line or "of the formula" in line:
            record_result(line.partition(":")[0].lstrip("."), line)


def interpret(kind: str, tests: Path, named: str = "") -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--timeout=900", "-m", kind]
    return run(*command, "-k", named, "--durations=8", str(tests), TRITON_INTERPRET="1")


@pytest.mark.verify
def test_a_32_bit_address_is_caught() -> None:
    code = """
import sys
from tests.support import honest_interpreter
honest_interpreter.install()
from divisi.kernels.attention import triton
triton.attention_prefill_fwd_kernel = honest_interpreter.planted(
    triton, "attention_prefill_fwd_kernel", "other=0).to(tl.int64)", "other=0)")
from tests.kernels.interpreted.test_addresses import test_kv_pages
test_kv_pages()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(TRITON_INTERPRET="1"), cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode != 0


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.verify), 90, pytest.param(100, marks=pytest.mark.verify)]
)
def test_compiled(arch: int, full_tier: bool, record_result: Callable[[str, object], None]) -> None:
    wanted = [] if full_tier else ["gated_delta_decode"]
    out = run(sys.executable, "-m", "tests.support.compile_kernels", str(arch), *wanted)
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert found
    problems = [problem for kernel in found for problem in wrong(arch, kernel)]
    assert not problems, "\n".join(problems)
    for kernel in found:
        record_result(f"sm_{arch} {kernel['kernel']} {kernel['shared']}", f"{kernel['registers']} registers")


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.verify), 90, pytest.param(100, marks=pytest.mark.verify)]
)
def test_first_run_and_replay_round_the_same_product(arch: int) -> None:
    """As compiled: the interpreter cannot show it. A replay that leaves it to the compiler is seen."""
    orders = json.loads(run(sys.executable, "-m", "tests.support.decay_order", str(arch)))
    assert orders["shipped"] == {"state x decay": 2, "key x delta": 0}
    assert orders["planted"] == {"state x decay": 1, "key x delta": 1}


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "blocks"),
    [(Chip.H100, 209, 0, 8, 1), (Chip.H100, 168, 0, 4, 3), (Chip.H100, 32, 100_000, 4, 2), (Chip.A100, 16, 0, 16, 4)],
)
def test_blocks_that_fit_on_a_multiprocessor(chip: Chip, registers: int, shared: int, warps: int, blocks: int) -> None:
    kernel = {"registers": registers, "shared": shared, "warps": warps}
    assert resident_blocks(chip, kernel) == blocks


def wrong(arch: int, kernel: dict[str, Any]) -> list[str]:
    """What a compiled kernel should not be."""
    name, problems = kernel["kernel"], []
    if kernel["spill_bytes"] > MAY_SPILL.get((arch, name), 0):
        problems.append(f"{name} spills {kernel['spill_bytes']} bytes")
    if kernel["shared"] > SHARED_MEMORY[arch]:
        problems.append(f"{name} wants {kernel['shared']} bytes of shared memory")
    if told := wrong_instructions(arch, name, kernel["instructions"]):
        problems.append(told)
    if kernel["tensor_columns"] > 512:
        problems.append(f"{name} wants {kernel['tensor_columns']} columns of tensor memory")
    if name == "gated_delta_decode_fwd_kernel" and kernel["contracted_exchanges"]:
        problems.append(f"{name} contracts {kernel['contracted_exchanges']} products that lanes exchange")
    return problems


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, check=False, timeout=1400
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(ROOT)} | variables
