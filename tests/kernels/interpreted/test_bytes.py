"""What kernels read and write, beside the formulas that benchmarks and the table of kernels go by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from divisi.benchmarks.gpu import cases, mixture_cases
from divisi.benchmarks.gpu.cases import Case, DeltaShape, Draw
from divisi.benchmarks.gpu.shapes import HEADS
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from tests.support.interpreted_bytes import counted

MOST = 1.15
KERNELS = assembled({"triton": triton_operations(Chip.H100)}, "triton")
HEAD = DeltaShape(1, 2, 128, 128, 4)
"""A key head of the published model with its value heads."""
CASES: dict[str, Callable[..., Case]] = {
    "rms_norm": partial(cases.rms_norm, tokens=64, width=512),
    "add_rms_norm": partial(cases.add_rms_norm, tokens=64, width=512),
    "silu_mul": partial(cases.silu_mul, tokens=4, inner=512),
    "route": partial(cases.route, tokens=4, experts=512, chosen=10),
    "attention_inputs": partial(cases.attention_inputs, tokens=4, heads=HEADS, pages=4),
    "attention_decode": partial(
        cases.attention, operation="attention_decode", heads=HEADS, lengths=[1023, 300], rows=[1, 1]
    ),
    "attention_decode of 4 rows": partial(
        cases.attention, operation="attention_decode", heads=HEADS, lengths=[1020], rows=[4]
    ),
    "attention_prefill": partial(
        cases.attention, operation="attention_prefill", heads=HEADS, lengths=[256], rows=[64]
    ),
    "routed_experts": partial(cases.routed_experts, tokens=4, chosen=2, experts=4, width=256, inner=128),
    "gated_delta_decode": partial(cases.gated_delta_decode, shape=HEAD, rows=[1, 1], lags=[1, 1], max_rows=1),
    "gated_delta_decode of 4 rows": partial(cases.gated_delta_decode, shape=HEAD, rows=[4], lags=[3], max_rows=4),
    "gated_delta_prefill": partial(cases.gated_delta_prefill, shape=HEAD, lengths=[0], rows=[256]),
    "mixture_add_norm": partial(
        mixture_cases.mixture_add_norm, tokens=16, chosen=2, width=512, inner=16, experts=4, summed=True
    ),
}
SLOW = (
    "attention_decode of 4 rows", "gated_delta_decode of 4 rows", "gated_delta_prefill", "attention_prefill",
    "attention_decode",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.verify) if name in SLOW else name for name in CASES]
)
def test_no_more_is_moved_than_the_formula_says(name: str) -> None:
    case = CASES[name](Draw(0, torch.bfloat16, torch.device("cpu")), name)
    with counted() as traffic:
        case.run(KERNELS)
    formula = case.bytes + case.between
    print(f"{name}: {traffic.read} B read, {traffic.written} B written, {traffic.moved / formula:.3f} of the formula")
    assert 0.8 * formula < traffic.moved <= MOST * formula
