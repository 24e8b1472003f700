"""`python -m tests.support.compile_kernels ARCH [OPERATION...]`: compile what production launches; a JSON line each.

Runs the production host code on CPU tensors under the stub driver, at the published shapes and at all configurations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from divisi.benchmarks.gpu import cases, mixture_cases, sampling_cases
from divisi.benchmarks.gpu.cases import Case, Draw
from divisi.benchmarks.gpu.shapes import DELTA, HEADS
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from tests.support import stub_driver

_experts = partial(cases.routed_experts, chosen=10, experts=32, width=2048, inner=512)
_decode = partial(cases.attention, operation="attention_decode", heads=HEADS)
LAUNCHED: dict[str, list[Callable[..., Case]]] = {
    "rms_norm": [partial(cases.rms_norm, tokens=4, width=2048)],
    "add_rms_norm": [partial(cases.add_rms_norm, tokens=4, width=2048)],
    "silu_mul": [partial(cases.silu_mul, tokens=4, inner=512)],
    "mixture_inputs": [
        partial(mixture_cases.mixture_inputs, tokens=4, experts=512, chosen=10, width=2048, inner=512)
    ],
    "mixture_add_norm": [
        partial(mixture_cases.mixture_add_norm, tokens=4, chosen=10, width=2048, inner=512, experts=32, summed=summed)
        for summed in (False, True)
    ],
    "route": [partial(cases.route, tokens=4, experts=512, chosen=10)],
    "choose_tokens": [partial(sampling_cases.choose_tokens, rows=2, vocab=151_936)],
    "attention_inputs": [partial(cases.attention_inputs, tokens=4, heads=HEADS, pages=4)],
    "attention_decode": [partial(_decode, lengths=[300, 20], rows=[n, n]) for n in (1, 4, 8)],
    "attention_prefill": [
        partial(cases.attention, operation="attention_prefill", heads=HEADS, lengths=[300, 20], rows=[14, 4])
    ],
    "routed_experts": [partial(_experts, tokens=n) for n in (4, 100, 300)],
    "gated_delta_decode": [
        partial(cases.gated_delta_decode, shape=DELTA, rows=[n, n], lags=[1, 1], max_rows=4) for n in (1, 4)
    ],
    "gated_delta_prefill": [partial(cases.gated_delta_prefill, shape=DELTA, lengths=[0, 9], rows=[70, 10])],
    "gated_delta_flush": [partial(cases.gated_delta_flush, shape=DELTA, lags=[1, 2], max_rows=4)],
}


class _Ones(Draw):
    """Numbers do not matter here, and drawing them takes long."""

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.ones(size, dtype=dtype or self.dtype)


def main() -> None:
    arch, wanted = int(sys.argv[1]), sys.argv[2:] or list(LAUNCHED)
    stub = stub_driver.install(arch)
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    draw = _Ones(0, torch.bfloat16, torch.device("cpu"))
    seen: set[str] = set()
    for operation in wanted:
        for make in LAUNCHED[operation]:
            make(draw, operation).run(kernels)
            for key in sorted(stub.kernels.keys() - seen):
                kernel = stub.kernels[key]
                used = asdict(stub_driver.resources(kernel, arch))
                print(json.dumps({"operation": operation, "kernel": kernel.metadata.name, **used}), flush=True)
            seen |= stub.kernels.keys()


if __name__ == "__main__":
    main()
