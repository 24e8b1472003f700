"""`python -m tests.support.decode_variants ARCH`: into how many variants decode steps specialise each kernel; JSON.

Four published layers on CPU tensors, whose addresses are real, under the stub driver: Triton compiles as in production.
The vendor's products are left out, and no kernel runs, so the numbers mean nothing. First come those of a worker's
start; what later steps compile is told too.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
import triton

from divisi.benchmarks.gpu import stub_driver
from divisi.benchmarks.gpu.ahead import CHIPS, CPU, SLOTS, Published, no_product
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.warm_up import StepSizes, warm_up

LATER = [
    ([1] * 3, 5), ([2] * 5, 7), ([1] * 16, 16), ([4] * 3, 33), ([1] * 31, 48), ([3, 1, 4], 9), ([4] * 4, 100),
    ([1] * 48, 2100), ([4, 0, 2, 1], 11),
]  # fmt: skip


SCANNED = [[3], [96], [900], [30] * 16, [700, 1000]]
SIZES = StepSizes(sequences=SLOTS, rows=4, pages=4096, tokens=2048, padded=True)


def main() -> None:
    arch = int(sys.argv[1])
    stub_driver.install(arch)
    variants: dict[str, list[Any]] = {}
    compiled: list[str] = []

    def note(*, key: Any, repr: str, fn: Any, compile: Any, is_manual_warmup: Any, already_compiled: Any) -> None:
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        configuration = json.dumps([repr.split("[")[0], _named(compile["constants"], fn), options], default=str)
        variants.setdefault(configuration, []).append(key)
        compiled.append(configuration)

    triton.knobs.runtime.jit_post_compile_hook = note
    model = Published(assembled({"triton": triton_operations(CHIPS[arch])}, "triton"))
    with mock.patch.object(torch, "mm", no_product):
        warm_up(model.runner, model.end, SIZES, CPU)
    compiled.clear()
    for _ in range(2):  # the second time from the pass's own memory
        for rows, pages in LATER:
            model.decode(rows, pages)
        for runs in SCANNED:
            model.scan(runs)
    json.dump({"variants": {name: len(keys) for name, keys in variants.items()}, "later": compiled}, sys.stdout)


def _named(constants: Any, fn: Any) -> dict[str, str]:
    """Constants by name, but for arguments that are specialised as 1 or as missing."""
    names = [parameter.name for parameter in fn.jit_function.params if parameter.is_constexpr]
    places = {fn.jit_function.params[at[0]].name: str(value) for at, value in constants.items()}
    return {name: places[name] for name in names if name in places}


if __name__ == "__main__":
    main()
