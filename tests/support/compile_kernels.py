"""`python -m tests.support.compile_kernels ARCH [OPERATION...]`: compile what production launches; a JSON line each.

Runs the production host code on CPU tensors under the stub driver, at the published shapes and at all configurations.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import LAUNCHED, Ones
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from tests.support.resources import resources


def main() -> None:
    arch, wanted = int(sys.argv[1]), sys.argv[2:] or list(LAUNCHED)
    stub = stub_driver.install(arch)
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    draw = Ones(0, torch.bfloat16, torch.device("cpu"))
    seen: set[str] = set()
    for operation in wanted:
        for make in LAUNCHED[operation]:
            make(draw, operation).run(kernels)
            for key in sorted(stub.kernels.keys() - seen):
                kernel = stub.kernels[key]
                used = asdict(resources(kernel, arch))
                print(json.dumps({"operation": operation, "kernel": kernel.metadata.name, **used}), flush=True)
            seen |= stub.kernels.keys()


if __name__ == "__main__":
    main()
