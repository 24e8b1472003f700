"""Builds the C++ kernels for this machine on first use, and loads them.

The library is plain C++ without torch headers, built in seven seconds and kept in the user's cache under a name made
of the sources, the flags and the processor. It shares torch's OpenMP threads, since both ask for ``libgomp.so.1``.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401  loads its libgomp first, so that there is one pool of threads

_KERNELS = Path(__file__).parent.parent
_HEADERS = _KERNELS / "native"
_ROUNDING = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_FLAGS = ("-std=c++17", "-O3", "-march=native", *_ROUNDING, "-fopenmp", "-fPIC", "-shared")

_log = logging.getLogger(__name__)

_DECLARATION = re.compile(r'extern "C" void (\w+)\(([^)]*)\)')
_SCALARS: dict[str, type] = {"int": ctypes.c_int, "long": ctypes.c_long, "float": ctypes.c_float}


@cache
def load_library(cache_dir: Path | None = None) -> ctypes.CDLL | None:
    """The kernels as a ctypes library; None, with a warning, where they cannot be built."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _log.warning("no C++ compiler (g++) found: the CPU runs on the slower PyTorch kernels")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler, cache_dir or Path.home() / ".cache" / "divisi")))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("the C++ kernels cannot be built (%s): the CPU runs on the slower PyTorch kernels", detail)
        return None
    for source in _sources():
        for name, parameters in _DECLARATION.findall(source.read_text()):
            function = getattr(library, name)
            function.argtypes, function.restype = [_argument(text) for text in parameters.split(",")], None
    return library


def _sources() -> list[Path]:
    return sorted(_KERNELS.glob("*/native.cpp"))


def _argument(parameter: str) -> type:
    """The ctypes type of a C++ parameter such as ``const float* x`` or ``long t``."""
    return ctypes.c_void_p if "*" in parameter else _SCALARS[parameter.split()[0]]


def _build(compiler: str, cache_dir: Path) -> Path:
    target = cache_dir / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers start at once: one builds
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                built = Path(scratch) / "kernels.so"
                command = [compiler, *_FLAGS, f"-I{_HEADERS}", *map(str, _sources()), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(target)
    return target


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted([*_sources(), *_HEADERS.glob("*.h")]):
        digest.update(path.read_bytes())
    digest.update(subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout)
    # a home shared between machines holds one build per kind of processor
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest.update(f"{platform.machine()} {flags}".encode())
    return digest.hexdigest()[:16]
