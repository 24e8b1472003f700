"""Every Triton kernel against its reference in fp32, over the programs in three orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import Case, DeltaShape, Draw, Heads
from divisi.benchmarks.gpu.check import expect_close
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import Kernels, select_kernels
from tests.support.honest_interpreter import grid_order

CPU = torch.device("cpu")
TRITON = cast(Kernels, SimpleNamespace(**triton_operations(Chip.H100)))
SMALL, ODD = DeltaShape(1, 2, 16, 16, 4), DeltaShape(2, 4, 12, 20, 3)
HEADS, ODD_HEADS = Heads(4, 2, 16, 8, 4), Heads(3, 1, 24, 6, 3)
Make = Callable[[Draw, str], Case]

CASES: dict[str, Make] = {
    "norm": partial(cases.rms_norm, tokens=3, width=61),
    "norm of nothing": partial(cases.rms_norm, tokens=0, width=16),
    "add and norm": partial(cases.add_rms_norm, tokens=5, width=96),
    "silu": partial(cases.silu_mul, tokens=3, inner=1031),
    "route": partial(cases.route, tokens=7, experts=37, chosen=5),
    "route with ties": partial(cases.route, tokens=7, experts=37, chosen=5, ties=True),
    "route to all": partial(cases.route, tokens=1, experts=8, chosen=8),
    "inputs": partial(cases.attention_inputs, tokens=5, heads=HEADS, pages=4),
    "odd inputs": partial(cases.attention_inputs, tokens=3, heads=ODD_HEADS, pages=3),
    "decode": partial(cases.attention, operation="attention_decode", heads=HEADS, lengths=[9, 0, 37], rows=[1, 1, 1]),
    "verify": partial(
        cases.attention, operation="attention_decode", heads=ODD_HEADS, lengths=[5, 70, 0, 8], rows=[3, 4, 1, 0]
    ),
    "decode of many splits": partial(
        cases.attention, operation="attention_decode", heads=Heads(2, 1, 16, 8, 64), lengths=[1300, 3], rows=[2, 1]
    ),
    "prefill": partial(
        cases.attention, operation="attention_prefill", heads=HEADS, lengths=[0, 13, 4], rows=[5, 0, 150]
    ),
    "experts": partial(cases.routed_experts, tokens=7, chosen=3, experts=5, width=40, inner=24, elsewhere=2),
    "no tokens": partial(cases.routed_experts, tokens=0, chosen=2, experts=3, width=16, inner=16),
    "all to one of poisoned experts": partial(
        cases.routed_experts, tokens=37, chosen=1, experts=3, width=16, inner=16, only=1
    ),
    "delta decode": partial(cases.gated_delta_decode, shape=SMALL, rows=[1, 1, 1], lags=[1, 0, 1], max_rows=1),
    "delta verify": partial(
        cases.gated_delta_decode, shape=ODD, rows=[3, 1, 4, 0], lags=[4, 0, 2, 0], max_rows=4
    ),
    "delta prefill": partial(
        cases.gated_delta_prefill, shape=SMALL, lengths=[0, 7, 2], rows=[131, 5, 64], middles=[[3, 64, 100], [], [1]]
    ),
    "odd delta prefill": partial(cases.gated_delta_prefill, shape=ODD, lengths=[9, 0], rows=[0, 70]),
}  # fmt: skip


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype, order: str) -> None:
    case = CASES[name](Draw(len(name), dtype, CPU), name)
    reference = case.mapped(cases.exact).run(select_kernels(CPU, "reference"))
    with grid_order(order):
        actual = case.run(TRITON)
    expect_close(case.operation, dtype, actual, reference)
