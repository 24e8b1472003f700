"""The bytes that kernels read and write in Triton's interpreter, each byte of a launch once.

That is what a launch moves where its caches forget nothing; what it reads again and again does not show. For a process
with TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter


@dataclass
class Traffic:
    """Bytes of launches, one after another."""

    read: int = 0
    written: int = 0
    _reads: list[np.ndarray] = field(default_factory=list)
    _writes: list[np.ndarray] = field(default_factory=list)

    @property
    def moved(self) -> int:
        return self.read + self.written

    def note(self, kept: list[np.ndarray], pointers: Any, mask: Any) -> None:
        """Elements that are not masked off."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        begins = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        kept.append((begins[:, None] + np.arange(size, dtype=begins.dtype)).ravel())

    def end_launch(self) -> None:
        self.read += _count(self._reads)
        self.written += _count(self._writes)
        self._reads, self._writes = [], []


def _count(kept: list[np.ndarray]) -> int:
    return len(np.unique(np.concatenate(kept))) if kept else 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the launches within."""
    builder, executor, traffic = interpreter.InterpreterBuilder, interpreter.GridExecutor, Traffic()
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def noted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        traffic.note(traffic._reads, pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.note(traffic._writes, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launched(self: Any, *arguments: Any, **named: Any) -> Any:
        result = call(self, *arguments, **named)
        traffic.end_launch()
        return result

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    executor.__call__ = launched
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = call
