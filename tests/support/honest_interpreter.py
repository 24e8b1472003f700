"""Triton's interpreter made to compute as a GPU does, and to run its grid in any order. Import it before any kernel.

As it is, the interpreter (3.6 and 3.7) keeps bf16 as 16-bit patterns: products and sums are of the patterns, and casts
to bf16 truncate. And it runs programs one after another in one order, so that a program that reads what another writes
always finds it written, or never.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float16: (torch.float16, torch.uint16),
    tl.float32: (torch.float32, torch.uint32),
    tl.float64: (torch.float64, torch.uint64),
}
_original_convert = interpreter._convert_float
_original_binary = interpreter.InterpreterBuilder.binary_op


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    source, target = source.scalar, target.scalar
    if source not in _TORCH or target not in _TORCH:
        return _original_convert(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(np.dtype(f"u{data.dtype.itemsize}"))
    cast = torch.from_numpy(bits).view(_TORCH[source][0]).to(_TORCH[target][0])
    return cast.view(_TORCH[target][1]).numpy().reshape(data.shape)


def _values(handle: Any) -> np.ndarray:
    """A tensor's numbers: of bf16, which numpy lacks, as fp32."""
    if handle.dtype.scalar is tl.bfloat16:
        return _convert(handle.data, handle.dtype, tl.float32, None).view(np.float32)
    return handle.data


def _dot(self: Any, a: Any, b: Any, total: Any, precision: Any, most_imprecise: Any) -> Any:
    left, right = _values(a), _values(b)
    if precision == ir.INPUT_PRECISION.TF32 and left.dtype == np.float32:  # the matrix units cut 13 bits off
        left, right = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (left, right))
    product = np.matmul(left, right, dtype=total.data.dtype)
    return interpreter.TensorHandle(product + total.data, total.dtype.scalar)


def _binary(self: Any, left: Any, right: Any, operation: Callable[..., np.ndarray]) -> Any:
    if left.dtype.scalar is not tl.bfloat16:
        return _original_binary(self, left, right, operation)
    out = operation(_values(left), _values(right))
    if out.dtype == np.bool_:
        return interpreter.TensorHandle(out, tl.int1)
    return interpreter.TensorHandle(_convert(out.astype(np.float32), tl.float32, tl.bfloat16, None), tl.bfloat16)


def install() -> None:
    """Honest bf16, from now on in this process."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.binary_op = _binary
    interpreter.InterpretedFunction.__call__ = _call_within
    interpreter.GridExecutor.__call__ = _launched


_patched: set[int] = set()
"""Modules whose view of Triton's language has been replaced in the launch under way."""
_launch = interpreter.GridExecutor.__call__


def _launched(self: Any, *args: Any, **named: Any) -> Any:
    _patched.clear()
    return _launch(self, *args, **named)


def _call_within(self: Any, *args: Any, **named: Any) -> Any:
    """A function that a kernel calls. Triton replaces its language for each call, which takes most of the time; once
    for each module and launch is enough.
    """
    module = id(self.fn.__globals__)
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **named)


@contextmanager
def grid_order(order: str, seed: int = 0) -> Iterator[None]:
    """Run programs ``forward``, in ``reverse`` or ``shuffled``.

    The executor's loops over ``range(grid[i])`` are kept; the index that a program is told is another one.
    """
    builder = interpreter.interpreter_builder
    told = builder.set_grid_idx
    shuffles: dict[tuple[int, ...], Sequence[tuple[int, ...]]] = {}

    def set_grid_idx(x: int, y: int, z: int) -> None:
        grid = tuple(builder.grid_dim)
        if grid not in shuffles:
            places = list(itertools.product(*map(range, grid)))
            if order == "reverse":
                places.reverse()
            if order == "shuffled":
                random.Random(seed).shuffle(places)
            shuffles[grid] = places
        told(*shuffles[grid][(x * grid[1] + y) * grid[2] + z])

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_idx = told


def planted(module: ModuleType, kernel: str, right: str, wrong: str) -> Any:
    """A kernel of the module with ``right`` in the module's source replaced by ``wrong``, from a copy of the module."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"the module has {right!r} {source.count(right)} times"
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # kernels are read from their files
        file.write(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"planted_{kernel}", file.name)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return getattr(copy, kernel)
