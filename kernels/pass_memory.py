"""Memory for what a pass's operations hand to each other, at the same addresses whenever a pass of its size comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

PassKind = Literal["full", "even draft", "odd draft"]
"""Draft passes of a step take turns: each finds what the one before it left."""
_ALIGNED = 256
_LEAST = 1 << 20


class Memory(Protocol):
    """Where operations get the memory for their results."""

    def begin(self, kind: PassKind, device: torch.device, *, decoding: bool) -> None:
        """A pass begins, of decoding rows alone or not; what the one of its kind before it got is free."""
        ...

    def layer(self, index: int) -> None:
        """One of its layers begins; what the layer before the last one got is free."""
        ...

    def after_layers(self) -> None:
        """The last layer is done."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Like torch.empty."""
        ...


class TorchMemory:
    """torch's allocator. Implements `Memory`."""

    def begin(self, kind: PassKind, device: torch.device, *, decoding: bool) -> None:
        """See Memory."""

    def layer(self, index: int) -> None:
        """See Memory."""

    def after_layers(self) -> None:
        """See Memory."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Memory."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)


class Buffers:
    """Gives the n-th result of a pass of decoding rows the same bytes each time. Implements `Memory`.

    There is a region for each kind of pass and two that layers use by turns, so that a layer finds what the one before
    it left. A region that was too small grows before the next pass; until then, outside of passes, and in passes with
    prefilling rows, it is torch's allocator that gives.
    """

    def __init__(self) -> None:
        self._layers = (_Region(), _Region())
        self._passes: dict[PassKind, _Region] = {kind: _Region() for kind in ("full", "even draft", "odd draft")}
        self._pass: _Region | None = None
        self._current: _Region | None = None

    def begin(self, kind: PassKind, device: torch.device, *, decoding: bool) -> None:
        """See Memory."""
        self._pass = self._current = self._passes[kind] if decoding else None
        if self._pass is not None:
            for region in (self._pass, *self._layers):
                region.grow(device)
            self._pass.reset()

    def layer(self, index: int) -> None:
        """See Memory."""
        if self._pass is not None:
            self._current = self._layers[index % 2]
            self._current.reset()

    def after_layers(self) -> None:
        """See Memory."""
        self._current = self._pass

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Memory."""
        found = None if self._current is None else self._current.take(tuple(shape), dtype)
        return torch.empty(tuple(shape), dtype=dtype, device=device) if found is None else found


class _Region:
    """One block of bytes, given out from its first on."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._used = self._most = 0
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    def grow(self, device: torch.device) -> None:
        """Take as much memory as was wanted at once so far. Nothing that was given out is used any more."""
        self._most = max(self._most, self._used)
        if self._most > self._bytes.numel():
            size = max(_LEAST, 1 << (self._most - 1).bit_length())
            self._bytes, self._views = torch.empty(size, dtype=torch.uint8, device=device), {}

    def reset(self) -> None:
        """Nothing that was given out is used any more."""
        self._most = max(self._most, self._used)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The next free bytes; None where there are too few."""
        start, count = self._used, math.prod(shape) * dtype.itemsize
        self._used += -(-count // _ALIGNED) * _ALIGNED
        if self._used > self._bytes.numel():
            return None
        key = start, shape, dtype
        if (view := self._views.get(key)) is None:
            view = self._views[key] = self._bytes[start : start + count].view(dtype).view(shape)
        return view
