"""Every Triton kernel against its reference in fp32, over the programs in three orders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import DeltaShape, Draw
from divisi.benchmarks.gpu.check import expect_close, expect_replay_in_bits
from divisi.benchmarks.gpu.shapes import CHECKED, ODD_DELTA, SMALL_DELTA
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import Kernels, select_kernels
from tests.support.honest_interpreter import grid_order

CPU = torch.device("cpu")
TRITON = cast(Kernels, SimpleNamespace(**triton_operations(Chip.H100)))


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHECKED)
def test_equals_the_reference(name: str, dtype: torch.dtype, order: str) -> None:
    case = CHECKED[name](Draw(len(name), dtype, CPU), name)
    reference = case.mapped(cases.exact).run(select_kernels(CPU, "reference"))
    with grid_order(order):
        actual = case.run(TRITON)
    expect_close(case.operation, dtype, actual, reference)


@pytest.mark.parametrize("shape", [SMALL_DELTA, ODD_DELTA])
def test_replay_leaves_the_bits_of_the_first_run(shape: DeltaShape) -> None:
    expect_replay_in_bits(TRITON, Draw(0, torch.bfloat16, CPU), shape)
