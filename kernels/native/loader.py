"""Builds the C++ kernels for this machine on first use, and loads them.

The library is plain C++ without torch headers (five seconds to build), is kept in the user's cache under a name made of
the sources, the flags and the processor, and shares torch's OpenMP threads, since both ask for ``libgomp.so.1``.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import platform
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

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "divisi_linear": [_P, _P, _I, _P, _L, _L, _L, _I],
    "divisi_add_rms_norm": [_P, _P, _P, _P, _L, _L, _F],
    "divisi_silu_mul": [_P, _P, _L, _L, _I],
    "divisi_route": [_P, _L, _P, _P, _L, _L, _L, _I, _I],
    "divisi_experts": [_P, _P, _P, _P, _P, _I, _P, _P, _P, _L, _L, _L, _L, _L, _I],
    "divisi_gated_delta_decode": [_P, _P, _P, _P, _P, _P, _P, _L],
    "divisi_gated_delta_prefill": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _L],
    "divisi_gated_delta_flush": [_P, _P, _P, _L],
    "divisi_attention_inputs": [_P, _P, _P, _P, _F, _P, _P, _I, _P, _P, _L, _L, _L, _L, _L, _I],
    "divisi_attention": [_P, _P, _P, _P, _I, _L, _P, _P, _P, _L, _P, _L, _L, _L, _L, _I],
}


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
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _build(compiler: str, cache_dir: Path) -> Path:
    sources = sorted(_KERNELS.glob("*/native.cpp"))
    target = cache_dir / f"kernels-{_fingerprint(compiler)}.so"
    if target.exists():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with open(cache_dir / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers start at once: one builds
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
                built = Path(scratch) / "kernels.so"
                command = [compiler, *_FLAGS, f"-I{_HEADERS}", *map(str, sources), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(target)
    return target


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted([*_KERNELS.glob("*/native.cpp"), *_HEADERS.glob("*.h")]):
        digest.update(path.read_bytes())
    digest.update(subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout)
    # a home shared between machines holds one build per kind of processor
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest.update(f"{platform.machine()} {flags}".encode())
    return digest.hexdigest()[:16]
