"""Time of a call on the device, with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from divisi.benchmarks.gpu.cases import Case
from divisi.kernels.gated_delta.layout import DeltaState
from divisi.kernels.select import Kernels

_BUDGET_MS = 150.0  # of timed calls; a slow reference gets three


class Timer:
    """Holds the buffer whose clearing evicts everything else from the L2 cache, and keeps the device busy meanwhile.

    While the device clears it, the host has time to enqueue the call, so that what is timed is the device's work and
    not the host's, as long as the host does not wait for the device within the call.
    """

    def __init__(self, device: torch.device) -> None:
        self._evict = torch.empty(2**30, dtype=torch.int8, device=device)

    def milliseconds(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """The median over repeated calls; ``before`` runs in front of each, untimed."""
        first = self._once(call, before)
        count = int(min(max(_BUDGET_MS / max(first, 0.005), 3), 30))
        return statistics.median(self._once(call, before) for _ in range(count))

    def _once(self, call: Callable[[], object], before: Callable[[], object]) -> float:
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._evict.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    def case(self, case: Case, kernels: Kernels) -> float:
        """Of one case, whose slots are put back to where they stood before each call."""
        positions = [(a.position_S, a.position_S.clone()) for a in case.arguments if isinstance(a, DeltaState)]

        def put_back() -> None:
            for position_S, before_S in positions:
                position_S.copy_(before_S)

        operation: Callable[..., Any] = case.call(kernels)
        operation(*case.arguments)
        try:
            return self.milliseconds(lambda: operation(*case.arguments), put_back)
        finally:
            put_back()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source, target = (torch.empty(2**30, dtype=torch.int8, device=device) for _ in range(2))
    timer = Timer(device)
    return 2e3 * source.nbytes / timer.milliseconds(lambda: target.copy_(source))


def product_rate(device: torch.device) -> float:
    """Operations per second of a large bf16 product of random numbers."""
    size = 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2e3 * size**3 / Timer(device).milliseconds(lambda: a @ b)
