"""Which builds of the C++ kernels there are, and which of them this processor can run. Imports no torch."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_log = logging.getLogger(__name__)

_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AMX = frozenset({"amx_tile", "amx_bf16"})
_ARCH_PRCTL, _REQUEST_STATE, _TILES = 158, 0x1023, 18  # system call, ARCH_REQ_XCOMP_PERM, the state's number


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
        Variant(
            "amx",
            ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DDIVISI_AMX"),
            _V4 | _AMX | {"avx512_bf16"},
            bf16=True,
        ),
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
        raise ValueError(
            f"kernels {name!r} need a processor with {missing}, which Linux lets be used; "
            "use 'native', the fastest that runs here"
        )
    return variant


def runnable_variants() -> tuple[Variant, ...]:
    """What this processor can run, the fastest first."""
    return tuple(variant for variant in VARIANTS.values() if variant.needs <= processor_flags())


@cache
def processor_flags() -> frozenset[str]:
    """The instruction sets of an x86-64 processor that this process may use, as Linux names them; nothing on others."""
    told = _told_flags()
    return told if told >= _AMX and _may_use_tiles() else told - _AMX


def _may_use_tiles() -> bool:
    """Whether Linux lets this process have the registers of AMX, 8 KiB a thread: it wants to be asked."""
    if ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILES) == 0:
        return True
    _log.warning("the processor has AMX, which Linux refuses to this process: %s", os.strerror(ctypes.get_errno()))
    return False


def _told_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return frozenset()
    lines = cpuinfo.read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
