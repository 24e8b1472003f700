"""Which builds of the C++ kernels there are, and which of them this processor can run. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One build: the same sources for other instructions."""

    name: str
    flags: tuple[str, ...]
    """What the compiler is told of the processor."""
    needs: frozenset[str] = frozenset()
    """Flags of /proc/cpuinfo."""
    bf16: bool = False
    """Whether it holds the `bf16.cpp` of each operation, too."""


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("avx512-bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}, bf16=True),
        Variant("avx512", ("-march=x86-64-v4",), _V4),
        Variant("avx2", ("-march=x86-64-v3",), _V3),
    )
}
"""Those of x86-64 by name, the fastest first. Any machine can compile them."""

OWN = Variant("own", ("-march=native",))
"""For processors that can run none of them, compiled where it runs."""


def find_variant(name: str | None = None) -> Variant:
    """The variant of that name, or the fastest that this processor can run. Raises ValueError if it cannot run it."""
    runnable = runnable_variants()
    if name is None:
        return runnable[0] if runnable else OWN
    variant = VARIANTS[name]
    if variant not in runnable:
        missing = ", ".join(sorted(variant.needs - processor_flags()))
        raise ValueError(f"kernels {name!r} need a processor with {missing}; use 'native', the fastest that runs here")
    return variant


def runnable_variants() -> tuple[Variant, ...]:
    """What this processor can run, the fastest first."""
    return tuple(variant for variant in VARIANTS.values() if variant.needs <= processor_flags())


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets of an x86-64 processor, as Linux names them; nothing on others."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
