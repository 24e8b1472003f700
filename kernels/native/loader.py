"""Finds the C++ kernels for this processor, built ahead of time or on first use, and loads them.

The library is plain C++ without torch headers. One that nobody built ahead is compiled in ten seconds and kept in the
user's cache. It shares torch's OpenMP threads, since both ask for ``libgomp.so.1``.
"""

from __future__ import annotations

import ctypes
import logging
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor  # loads torch's libgomp first, so that there is one pool of threads

from divisi.kernels.native.build import CACHE, NoCompilerError, find, sources
from divisi.kernels.native.variants import Variant, find_variant

_log = logging.getLogger(__name__)

_DECLARATION = re.compile(r'extern "C" void (\w+)\(([^)]*)\)')
_SCALARS: dict[str, type] = {"int": ctypes.c_int, "long": ctypes.c_long, "float": ctypes.c_float}


@dataclass(frozen=True)
class Library:
    """A variant's functions."""

    variant: Variant
    functions: ctypes.CDLL


@cache
def load_library(name: str | None = None, cache_dir: Path | None = None) -> Library | None:
    """A variant of the kernels, by default the fastest that runs here; None, with a warning, where it cannot be built.

    Raises ValueError for a variant that the processor cannot run.
    """
    variant = find_variant(name)
    try:
        functions = ctypes.CDLL(str(find(variant, cache_dir or CACHE)))
    except (OSError, NoCompilerError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("the C++ kernels cannot be built (%s): the CPU runs on the slower PyTorch kernels", detail)
        return None
    _log.info("C++ kernels: %s", variant.name)
    for source in sources(variant):
        for function_name, parameters in _DECLARATION.findall(source.read_text()):
            function = getattr(functions, function_name)
            function.argtypes, function.restype = [_argument(text) for text in parameters.split(",")], None
    return Library(variant, functions)


def pointer(tensor: Tensor) -> int:
    """Where a tensor's values lie, side by side."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _argument(parameter: str) -> type:
    """The ctypes type of a C++ parameter such as ``const float* x`` or ``long t``."""
    return ctypes.c_void_p if "*" in parameter else _SCALARS[parameter.split()[0]]
