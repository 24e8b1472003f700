"""`python -m tests.support.decay_order ARCH`: how the decode kernel rounds a state's decay, compiled for a chip; JSON.

Replay and first run end a token with the same three operations on each element of the state, s g + k d. They give the
same bits only where both round the same product first: s g, then fma(k, d, s g). Left to itself the compiler makes
fma(s, g, k d) of one of them. In the machine's language one register, g, goes with all elements of a thread's part.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import torch

from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import LAUNCHED, Ones
from divisi.kernels.gated_delta import triton_decode
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from tests.support.honest_interpreter import planted

RIGHT = "        b_s = tl.fma(b_k[:, None], b_d[None, :], b_s * g)\n"
PLAIN = "        b_s = b_s * g + b_k[:, None] * b_d[None, :]\n"
KERNEL = "gated_delta_decode_fwd_kernel"
PART = 128
"""Elements of the state that a thread has: of 128 x 32 on one warp."""


def main() -> None:
    arch = int(sys.argv[1])
    stub = stub_driver.install(arch)
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    told = {"shipped": orders(stub, kernels)}
    triton_decode.gated_delta_decode_fwd_kernel = planted(triton_decode, KERNEL, RIGHT, PLAIN)
    told["planted"] = orders(stub, kernels)
    json.dump(told, sys.stdout)


def orders(stub: stub_driver.StubDriver, kernels: Any) -> dict[str, int]:
    before = set(stub.kernels)
    operation = "gated_delta_decode"
    LAUNCHED[operation][0](Ones(0, torch.bfloat16, torch.device("cpu")), operation).run(kernels)
    (ptx,) = (
        kernel.asm["ptx"]
        for key, kernel in stub.kernels.items()
        if key not in before and kernel.metadata.name == KERNEL
    )
    return found(ptx)


def found(ptx: str) -> dict[str, int]:
    """Updates of a thread's whole part that round s g first, and those that round k d first."""
    told = {"state x decay": 0, "key x delta": 0}
    for kind, elements in (("f32", 1), ("f32x2", 2)):  # Blackwell takes two elements at once
        product, update = rf"mul(?:\.rn)?\.{kind}", rf"fma\.rn\.{kind}"
        products = {to: (a, b) for to, a, b in re.findall(product + r"\s+(%\w+), (%\w+), (%\w+);", ptx)}
        updates = re.findall(update + r"\s+%\w+, (%\w+), (%\w+), (%\w+);", ptx)
        of_product = [(a, b, c) for a, b, c in updates if c in products]
        rounded = Counter(factor for _, _, c in of_product for factor in products[c])
        contracted = Counter(factor for a, b, _ in of_product for factor in (a, b))
        for name, counts in zip(told, (rounded, contracted), strict=True):
            told[name] += sum(n * elements >= PART for n in counts.values())
    return told


if __name__ == "__main__":
    main()
