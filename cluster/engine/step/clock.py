"""How long the passes of a step take, on a device that may be behind its host."""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

import torch


class PassClock:
    """Marks the ends of passes, without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun = 0.0
        self.laid_out_s = 0.0
        """What preceded the first pass; 0 without any."""
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def start(self) -> None:
        """A step begins, perhaps once more."""
        self._events, self._times = [], []
        self._begun, self.laid_out_s = perf_counter(), 0.0

    def begin(self) -> None:
        """The first pass begins."""
        self.laid_out_s = perf_counter() - self._begun
        self.mark()

    def mark(self, passes: int = 1) -> None:
        """A pass ends, or the first one begins; or `passes` end that were one call: each counts as much of it."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
            return
        now = perf_counter()
        before = self._times[-1] if self._times else now
        self._times += [before + (now - before) * ended / passes for ended in range(1, passes + 1)]

    def seconds(self) -> list[float]:
        """Of each pass that was marked; asked for once the device is past them, which reading a later result shows."""
        if self._on_gpu:
            return [1e-3 * start.elapsed_time(end) for start, end in pairwise(self._events)]
        return [end - start for start, end in pairwise(self._times)]
