"""Integers that the host lays out and the device reads: at the same addresses in each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNED = 4
"""Integers; 16 bytes, at which a GPU's kernels like their arrays to begin."""
_MOST_KEPT = 4096
"""Shapes."""
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Mirrored:
    """Integers on the host, and their copy on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        # Pageable on purpose: a copy from pinned memory could still be reading when the next step is laid out. What is
        # copied from here is in the driver's own memory when the call returns, which waits for no work of the device.
        self.host = torch.zeros(size, dtype=dtype)
        self.device = self.host if device.type == "cpu" else torch.zeros_like(self.host, device=device)

    def sent(self, count: int) -> Tensor:
        """All of the device's, once it has the first so many; they are always at the same address."""
        if self.device is not self.host:
            self.device[:count].copy_(self.host[:count], non_blocking=True)
        return self.device


class IntBuffer:
    """Arrays of int32 side by side, so that they reach the device in one copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._mirrored = Mirrored(size, torch.int32, device)
        self._values = self._mirrored.host.numpy()
        self._aligned = 1 if device.type == "cpu" else _ALIGNED
        self._used = 0
        self._known: dict[tuple[int, ...], tuple[list[slice], int]] = {}
        """Where arrays of such lengths lie, and what is used by them, by what was used before them and these."""

    def clear(self) -> None:
        """Nothing is in it; what is put next begins where it begins."""
        self._used = 0

    def reserve(self, count: int) -> slice:
        """Room for so many."""
        start = self._used
        self._used = start + -(-count // self._aligned) * self._aligned
        return slice(start, start + count)

    def put(self, values: list[int], *more: int) -> slice:
        """One array."""
        values = [*values, *more]
        part = self.reserve(len(values))
        self._values[part] = values
        return part

    def put_all(self, arrays: Sequence[list[int]]) -> list[slice]:
        """Several at once, which takes little longer than one."""
        first, shape = self._used, (self._used, *map(len, arrays))
        if (known := self._known.get(shape)) is None:
            parts = [self.reserve(len(array)) for array in arrays]
            known = parts, self._used
            keep(self._known, shape, known)
        parts, self._used = known
        if self._aligned > 1:
            arrays = [filled(array, -(-len(array) // self._aligned) * self._aligned, 0) for array in arrays]
        self._values[first : self._used] = [*chain.from_iterable(arrays)]
        return [*parts]

    def __getitem__(self, part: slice) -> NDArray[np.int32]:
        return self._values[part]

    def sent(self) -> Tensor:
        """The device's, with what was put."""
        return self._mirrored.sent(self._used)


def filled(values: list[int], count: int, filler: int) -> list[int]:
    """So many values, the last ones fillers."""
    return values if len(values) == count else values + [filler] * (count - len(values))


def keep(known: dict[KeyT, ValueT], key: KeyT, value: ValueT) -> None:
    """Remember a value, and forget all others once there are too many."""
    if len(known) >= _MOST_KEPT:
        known.clear()
    known[key] = value
