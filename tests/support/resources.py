"""What ptxas made of a kernel that Triton compiled: registers, spills, matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTIONS = {
    "mma": r"\bmma\.sync", "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "tma": r"cp\.async\.bulk\.tensor",
}  # fmt: skip
_MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
_PRODUCTS = (
    "attention_prefill", "experts_up", "experts_down", "delta_chunk", "delta_scan", "delta_output", "delta_leaf",
)  # fmt: skip
_SMALL_PRODUCTS = ("attention_split",)
_DESCRIBED = {90: ("_many", "delta_scan"), 100: ("delta_scan",)}


def expected(arch: int, kernel: str) -> set[str]:
    """The instructions that a kernel must have, and no other of these: of tiles of fewer than 64 rows any will do."""
    matrix = {_MATRIX[arch]} if any(part in kernel for part in _PRODUCTS) else set()
    return matrix | ({"tma"} if any(part in kernel for part in _DESCRIBED.get(arch, ())) else set())


def wrong_instructions(arch: int, kernel: str, found: Iterable[str]) -> str | None:
    """What is not as expected, or None."""
    found, wanted = set(found), expected(arch, kernel)
    if any(part in kernel for part in _SMALL_PRODUCTS):
        return None if found in ({"mma"}, {_MATRIX[arch]}) else f"{kernel} uses {found}, wanted mma or {_MATRIX[arch]}"
    return None if found == wanted else f"{kernel} uses {sorted(found)}, wanted {sorted(wanted)}"


@dataclass(frozen=True)
class Resources:
    """What ptxas made of a kernel."""

    registers: int
    stack: int
    spill_bytes: int
    """Of a thread, kept in memory: its stack or what it stores there, whichever is more."""
    shared: int
    tensor_columns: int
    """Of the 512 of tensor memory that a multiprocessor of sm_100 has."""
    instructions: dict[str, int]
    warps: int
    contracted_exchanges: int
    """Products contracted into the addition of what another lane sent: each lane then gets another sum."""


def resources(kernel: Any, arch: int) -> Resources:
    """Registers and stack from the machine code; spills as ptxas counts them."""
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = _output([_BIN / "cuobjdump", "--dump-resource-usage", cubin])
        ptxas = _BIN / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        verbose = _output([ptxas, "-v", f"--gpu-name=sm_{arch}{suffix}", ptx, "-o", "/dev/null"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    spills = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores)", verbose)]
    counts = {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in _INSTRUCTIONS.items()}
    return Resources(
        int(found[1]), int(found[2]), max(spills), kernel.metadata.shared,
        getattr(kernel.metadata, "tmem_size", 0) or 0,
        {name: count for name, count in counts.items() if count}, kernel.metadata.num_warps,
        _contracted_exchanges(kernel.asm["ptx"]),
    )  # fmt: skip


def _contracted_exchanges(ptx: str) -> int:
    received = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    products = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx)
    return sum(addend in received for addend in products)


def _output(command: list[Any]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
