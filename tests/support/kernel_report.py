"""`make kernels`: what the compiler made of every Triton kernel and shipped configuration, chip by chip, as a table.

Compiled, not measured: no GPU is needed and no speed is told. The numbers are those that test_triton.py bounds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import triton

from divisi.kernels.gpu.chip import Chip
from tests.support import kernel_model

OUT = Path(__file__).parent.parent.parent / "benchmarks/results/kernels.md"
_SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_REGISTERS_OF_SM, _WARPS_OF_SM, _COLUMNS_OF_SM, _RESERVED = 65_536, 64, 512, 1024
_HEAD = f"""# Kernels as compiled

By Triton {triton.__version__} at the shapes of Qwen3-Next-80B-A3B, without a GPU; nothing here is a measurement. Those of an H100 are in
gpu.md. Rows of one kernel are its configurations. A cell: registers a thread, bytes of a thread that are kept in memory (stack or spills)
if any, KiB of shared memory, columns of tensor memory if any (of 512), blocks that fit on a multiprocessor, matrix instructions and bulk
tensor copies in the PTX. Those are the expected ones: `tests/support/resources.py` says which, and a test fails where others are found.

Other cards have no configurations: `--kernels auto` runs the references there, and `--kernels triton` is refused
("kernels 'triton' need an NVIDIA A100, H100, B200 or alike; use 'auto' or 'reference'").

"""  # noqa: E501 - lines of the report
_REFUSED = """
## What runs where

Heads of more than 256 dims have no Triton attention on any chip: the reference runs, and the log says so once ("heads of 264 dims have
no Triton attention (at most 256): the reference runs").

"""  # noqa: E501 - lines of the report
_INSTEAD = {
    "experts_up_many_fwd_kernel": "experts_up, in tiles of 128 pairs",
    "experts_down_many_fwd_kernel": "experts_down, in tiles of 128 pairs",
}
_MODEL = f"""
## Modelled, not measured

At the shapes of gpu.md. Bytes are what an operation must read and write, and beside them what its launches hand to each other, each once.
A cell: microseconds, and in brackets their terms: memory at {kernel_model.SHARE:.0%} of the maker's bandwidth, products at
{kernel_model.SHARE:.0%} of the maker's bf16 rate (the larger of the two counts), and {kernel_model.LAUNCH_US:.0f} us a launch. What a
program waits for itself, and how fast instructions issue, is not in the model.

"""  # noqa: E501 - lines of the report


def main() -> None:
    chips = list(Chip)
    running = {
        chip: subprocess.Popen(
            [sys.executable, "-m", "tests.support.compile_kernels", str(chip.value)], stdout=subprocess.PIPE, text=True
        )
        for chip in chips
    }
    compiled = {}
    for chip, process in running.items():
        out, _ = process.communicate()
        if process.returncode:
            sys.exit(f"compiling for {chip.name} failed")
        compiled[chip] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    text = _HEAD + table(compiled) + _REFUSED + matrix(compiled) + _MODEL + kernel_model.table()
    OUT.write_text(text, encoding="utf-8")
    print(text)


def table(compiled: Mapping[Chip, Sequence[Mapping[str, Any]]]) -> str:
    """A row for each kernel and configuration; a chip that has fewer of a kernel leaves cells empty."""
    by_kernel: dict[tuple[str, str], dict[Chip, list[str]]] = {}
    for chip, kernels in compiled.items():
        for kernel in kernels:
            cells = by_kernel.setdefault((kernel["operation"], kernel["kernel"]), {})
            cells.setdefault(chip, []).append(cell(chip, kernel))
    names = " | ".join(chip.name for chip in compiled)
    lines = [f"| operation | kernel | {names} |", "|---" * (2 + len(compiled)) + "|"]
    for (operation, name), cells in by_kernel.items():
        for own in zip_longest(*(cells.get(chip, []) for chip in compiled), fillvalue=""):
            lines.append(f"| {operation} | {name.removesuffix('_fwd_kernel')} | {' | '.join(own)} |")
    return "\n".join(lines) + "\n"


def matrix(compiled: Mapping[Chip, Sequence[Mapping[str, Any]]]) -> str:
    """Which kernel is launched on which chip."""
    launched = {chip: {kernel["kernel"] for kernel in kernels} for chip, kernels in compiled.items()}
    names = " | ".join(chip.name for chip in compiled)
    lines = [f"| kernel | {names} |", "|---" * (1 + len(compiled)) + "|"]
    for name in sorted(set().union(*launched.values())):
        cells = ["yes" if name in launched[chip] else _INSTEAD.get(name, "never launched") for chip in compiled]
        lines.append(f"| {name.removesuffix('_fwd_kernel')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(chip: Chip, kernel: Mapping[str, Any]) -> str:
    """One configuration on one chip."""
    spilled = f", {kernel['spill_bytes']} B spilled" if kernel["spill_bytes"] else ""
    columns = f"{kernel['tensor_columns']} columns, " if kernel["tensor_columns"] else ""
    found = ", ".join(f"{name} {count}" for name, count in kernel["instructions"].items())
    return (
        f"{kernel['registers']}{spilled}, {kernel['shared'] / 1024:.0f} KiB, {columns}"
        f"{resident_blocks(chip, kernel)} x {kernel['warps']} warps{', ' + found if found else ''}"
    )


def resident_blocks(chip: Chip, kernel: Mapping[str, Any]) -> int:
    """How many blocks registers, shared memory and warps let be on a multiprocessor at once."""
    registers = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
    shared = kernel["shared"] + _RESERVED
    columns = _COLUMNS_OF_SM // max(kernel.get("tensor_columns", 0), 1)
    of_memory = min(_SHARED_OF_SM[chip.value] // shared, columns)
    return min(_REGISTERS_OF_SM // registers, of_memory, _WARPS_OF_SM // kernel["warps"])


if __name__ == "__main__":
    main()
