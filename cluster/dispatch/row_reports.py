"""What a meter has counted, for a thread that must never wait for a device.

The thread that keeps a shard in its seat is the one that hears that a peer has died. On a GPU whose kernels wait for
that peer it would hear nothing if it waited for what has been counted; so it takes what was copied since it last
asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor


class Counter(Protocol):
    """See `divisi.cluster.dispatch.meter.MeteredExperts`."""

    @property
    def num_leaves(self) -> int:
        """V."""
        ...

    def leaf_rows(self) -> Tensor:
        """Rows [L, V] by layer and virtual shard."""
        ...


class Event(Protocol):
    """See `torch.cuda.Event`."""

    def record(self) -> None:
        """Comes once everything launched so far has been done."""
        ...

    def query(self) -> bool:
        """Whether it has come; also where it was never recorded."""
        ...


class RowReports:
    """Of one meter, for one thread."""

    def __init__(self, meter: Counter, device: torch.device, new_event: Callable[[], Event] | None = None) -> None:
        """`new_event`: by default that of the device; a CPU has none, where rows are those of now."""
        on_gpu = device.type == "cuda"
        if new_event is None and on_gpu:
            new_event = torch.cuda.Event
        self._meter, self._copied = meter, None if new_event is None else new_event()
        self._rows_V = torch.zeros(meter.num_leaves, dtype=torch.int64, pin_memory=on_gpu)
        self._last: Mapping[str, float] = {}

    def rows(self) -> Mapping[str, float]:
        """Rows in all layers by virtual shard, of those that had any."""
        if self._copied is None:
            self._copy()
            self._read()
        elif self._copied.query():
            self._read()
            self._copy()
            self._copied.record()
        return self._last

    def _copy(self) -> None:
        with torch.inference_mode():
            self._rows_V.copy_(self._meter.leaf_rows().sum(0), non_blocking=True)

    def _read(self) -> None:
        self._last = {str(leaf): float(rows) for leaf, rows in enumerate(self._rows_V.tolist()) if rows}
