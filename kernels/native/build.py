"""Compiles the C++ kernels: `python -m divisi.kernels.native [DIR]` for all variants ahead, or one on first use.

A library's name holds a digest of the sources and flags, so that one of other sources is never taken for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from divisi.kernels.native.variants import VARIANTS, Variant

KERNELS = Path(__file__).parent.parent
BUILT_AHEAD = KERNELS / "native" / "built"
"""Where libraries are looked for first; a package or an image brings them along."""
_INCLUDES = f"-I{KERNELS / 'native'}", f"-I{KERNELS}"
_ROUNDING = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_FLAGS = ("-std=c++17", "-O3", *_ROUNDING, "-fopenmp", "-fPIC", "-shared")


CACHE = Path.home() / ".cache" / "divisi"
"""Where they are kept that are compiled on first use."""


class NoCompilerError(Exception):
    """There is no g++."""


def build_all(directory: Path = BUILT_AHEAD) -> list[Path]:
    """Compile every variant of x86-64 into a directory, on any machine that has a g++ for it; return the libraries.

    Raises NoCompilerError, and CalledProcessError with the compiler's words in `stderr`.
    """
    return [build(variant, directory) for variant in VARIANTS.values()]


def build(variant: Variant, directory: Path) -> Path:
    """The variant's library in a directory, compiled unless it is there. Raises as build_all does."""
    target = directory / file_name(variant)
    if target.exists():
        return target
    compiler = _compiler()
    if compiler is None:
        raise NoCompilerError("no C++ compiler (g++) found")
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers start at once: one builds
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                built = Path(scratch) / "kernels.so"
                command = [compiler, *_FLAGS, *variant.flags, *_INCLUDES, *map(str, sources(variant))]
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
                built.replace(target)
    return target


def find(variant: Variant, cache: Path = CACHE) -> Path:
    """The variant's library: built ahead, or the cache's, compiled unless it is there. Raises as build_all does."""
    ahead = BUILT_AHEAD / file_name(variant)
    return ahead if ahead.exists() else build(variant, cache)


def can_build(variant: Variant) -> bool:
    """Whether `find` would have one, without compiling it."""
    there = any((folder / file_name(variant)).exists() for folder in (BUILT_AHEAD, CACHE))
    return there or _compiler() is not None


def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def file_name(variant: Variant) -> str:
    """Of the file, by sources, flags and, where these leave it open, the processor."""
    digest = hashlib.sha256(" ".join((*_FLAGS, *variant.flags)).encode())
    for path in [*sources(variant), *sorted(KERNELS.glob("*/*.h"))]:
        digest.update(path.read_bytes())
    if not variant.needs and (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = cpuinfo.read_text().splitlines()
        digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return f"kernels-{variant.name}-{digest.hexdigest()[:16]}.so"


def sources(variant: Variant) -> list[Path]:
    """The C++ files of a variant."""
    return sorted([*KERNELS.glob("*/native.cpp"), *(KERNELS.glob("*/bf16.cpp") if variant.bf16 else ())])
