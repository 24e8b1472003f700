"""How long the passes of a step take, on a device that may be behind its host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from time import perf_counter

import torch


class PassClock:
    """Marks the ends of passes, without waiting for them. The first one's time is from when the step began."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def start(self) -> None:
        """A step begins, perhaps once more."""
        self._events, self._times = [], []
        self.mark()

    def mark(self) -> None:
        """A pass ends, or the step begins."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(perf_counter())

    def mark_all(self, seconds: Sequence[float]) -> None:
        """All passes have ended, which were one call on the host; `seconds` by pass."""
        first = perf_counter() - sum(seconds[1:])
        self._times += accumulate(seconds[1:], initial=first)

    def seconds(self) -> list[float]:
        """Of each pass that was marked; asked for once the device is past them, which reading a later result shows."""
        if self._on_gpu:
            return [1e-3 * start.elapsed_time(end) for start, end in pairwise(self._events)]
        return [end - start for start, end in pairwise(self._times)]
