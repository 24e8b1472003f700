"""Both implementations of the CPU kernels, and one table of tolerances for all of their tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from divisi.kernels.linear.layout import PackedMatrix
from divisi.kernels.native.variants import runnable_variants
from divisi.kernels.select import Kernels, select_kernels

BUILDS = [variant.name for variant in runnable_variants()] or ["native"]
"""Every build of the C++ kernels that this machine can run."""

# (operation, weight or cache dtype) -> absolute and relative tolerance against the fp32 reference on the same inputs
TOLERANCE = {
    ("linear", torch.float32): 2e-5,
    ("linear", torch.bfloat16): 2e-5,  # bf16 weights are exact in fp32, and the native product accumulates in fp32
    ("rounded linear", torch.bfloat16): 2**-8,  # half a unit in the last place, and a little of the sums
    ("norm", torch.float32): 2e-6,
    ("activation", torch.float32): 2e-6,
    ("router", torch.float32): 1e-6,
    ("experts", torch.float32): 2e-5,
    ("experts", torch.bfloat16): 2e-5,
    ("gated_delta", torch.float32): 5e-5,
    ("attention", torch.float32): 2e-5,
    ("attention", torch.bfloat16): 2e-5,
    (
        "tiled attention",
        torch.bfloat16,
    ): 2e-2,  # queries and weights rounded to bf16, of up to four values of up to four
}


def expect_close(
    operation: str, actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32
) -> None:
    tolerance = TOLERANCE[operation, dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="package", autouse=True)
def two_threads() -> Iterator[None]:
    """The kernels divide their work; the other tests run on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def packs(kernels: Kernels) -> bool:
    """Whether they work on packed bf16 weights."""
    return isinstance(kernels.pack_linear(torch.zeros(1, 1, dtype=torch.bfloat16)), PackedMatrix)


@pytest.fixture(scope="package", params=BUILDS)
def native(request: pytest.FixtureRequest, two_threads: None) -> Kernels:
    return select_kernels(torch.device("cpu"), request.param)


@pytest.fixture(scope="session")
def reference() -> Kernels:
    return select_kernels(torch.device("cpu"), "reference")


@pytest.fixture(params=["reference", *BUILDS])
def kernels(request: pytest.FixtureRequest, two_threads: None) -> Kernels:
    return select_kernels(torch.device("cpu"), request.param)
