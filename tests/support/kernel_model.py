"""What the published shapes must move and compute, and the time that a model of a chip gives; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from divisi.benchmarks.gpu.cases import Case, Draw
from divisi.benchmarks.gpu.shapes import TIMED
from divisi.kernels.gpu.chip import Chip

META = torch.device("meta")
SHARE = 0.8
"""Of the bandwidth, and of the products' peak, that a good kernel gets."""
LAUNCH_US = 3.0
LAUNCHES = {
    "gated_delta_decode": 2, "gated_delta_prefill": 6, "attention_decode": 2, "routed_experts": 4, "mixture_inputs": 3,
    "choose_tokens": 3,
}  # fmt: skip
"""More than one."""


@dataclass(frozen=True)
class Peak:
    """Of a chip, as its maker gives it."""

    bytes_per_s: float
    flops_per_s: float
    """bf16, dense."""


PEAKS = {Chip.A100: Peak(2.04e12, 312e12), Chip.H100: Peak(3.35e12, 989e12), Chip.B200: Peak(8.0e12, 2250e12)}


class Shapes(Draw):
    """Tensors without numbers."""

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device=META)


def published() -> Iterator[tuple[str, Case]]:
    """The cases that are timed on a GPU."""
    for name, make in TIMED:
        yield name, make(Shapes(0, torch.bfloat16, META), name)


def modelled_us(chip: Chip, case: Case) -> tuple[float, float, float]:
    """Microseconds for memory, for products (the larger of the two counts) and for launches, which come on top."""
    peak = PEAKS[chip]
    memory = (case.bytes + case.between) / (SHARE * peak.bytes_per_s)
    products = case.flops / (SHARE * peak.flops_per_s)
    return 1e6 * memory, 1e6 * products, LAUNCH_US * LAUNCHES.get(case.operation, 1)


def table() -> str:
    """A row for each case: what it moves and computes, and by chip the modelled time with its terms."""
    names = " | ".join(chip.name for chip in PEAKS)
    lines = [
        f"| operation | case | MB | between launches | GFLOP | FLOP/byte | {names} |", "|---" * (6 + len(PEAKS)) + "|"
    ]  # fmt: skip
    for name, case in published():
        cells = []
        for chip in PEAKS:
            memory, products, launches = modelled_us(chip, case)
            cells.append(f"{max(memory, products) + launches:,.0f} ({memory:,.1f}, {products:,.1f}, {launches:.0f})")
        lines.append(
            f"| {case.operation} | {name} | {case.bytes / 1e6:,.2f} | {case.between / 1e6:,.2f} | "
            f"{case.flops / 1e9:,.2f} | {case.flops / (case.bytes + case.between):,.1f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"
