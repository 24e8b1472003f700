"""`python -m tests.support.decode_variants ARCH`: into how many variants decode steps specialise each kernel; JSON.

Four published layers on CPU tensors, whose addresses are real, under the stub driver: Triton compiles as in production.
The vendor's products are left out, and no kernel runs, so the numbers mean nothing. The first steps are those that
start would have to run; what later ones compile is told too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast
from unittest import mock

import torch
import triton
from torch import Tensor

from divisi.cluster.dispatch.local import LocalEnd
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import assembled
from divisi.model.batch import DecodeRows, StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import whole_share
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.weights import load_weights
from tests.support import stub_driver
from tests.support.decode_launches import FakeCheckpoint
from tests.support.sparse_checkpoint import CONFIG

CPU = torch.device("cpu")
FIRST = [([1], 4), ([1] * 2, 40), ([4], 4), ([4] * 16, 64), ([1] * 64, 3000)]
"""Rows of the sequences, and pages of the longest one."""
LATER = [
    ([1] * 3, 5), ([2] * 5, 7), ([1] * 16, 16), ([4] * 3, 33), ([1] * 31, 48), ([3, 1, 4], 9), ([4] * 4, 100),
    ([1] * 48, 2100), ([4, 0, 2, 1], 11),
]  # fmt: skip


class EmptyCheckpoint(FakeCheckpoint):
    """On the CPU."""

    device = CPU


def batch(rows: Sequence[int], pages: int) -> StepBatch:
    """As the engine lays it out: arrays of int32 begin at 16 bytes."""
    total, runs = sum(rows), len(rows)
    starts = torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32)
    zeros = torch.zeros(total + runs, dtype=torch.int32)
    decode = DecodeRows(starts, zeros[:runs], zeros[:runs], torch.zeros((runs, pages), dtype=torch.int32))
    return StepBatch(
        torch.zeros(total, dtype=torch.int64), zeros[:total], zeros[:total], decode, None, total, torch.arange(total)
    )


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
    config = ModelConfig.from_hf(CONFIG | {"num_hidden_layers": 4})
    kernels = assembled({"triton": triton_operations(Chip(arch))}, "triton")
    bf16, checkpoint = torch.bfloat16, cast(Checkpoint, EmptyCheckpoint())
    with torch.inference_mode(), mock.patch.object(torch, "mm", _no_product):
        store = StateStore(config, num_pages=2, page_size=16, num_slots=2, max_rows=4, dtype=bf16, device=CPU)
        bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, bf16, CPU)
        runner = ModelRunner(config, load_weights(checkpoint, config, kernels, bf16, CPU), store, kernels)
        runner._activation_dtype = bf16
        told = []
        for steps in (FIRST, LATER):
            for _ in range(2):  # the second time from the pass's own memory
                for rows, pages in steps:
                    runner.forward(batch(rows, pages), LocalEnd(bank))
            told.append(list(compiled))
            compiled.clear()
    json.dump({"variants": {name: len(keys) for name, keys in variants.items()}, "later": told[1]}, sys.stdout)


def _named(constants: Any, fn: Any) -> dict[str, str]:
    """Constants by name, but for arguments that are specialised as 1 or as missing."""
    names = [parameter.name for parameter in fn.jit_function.params if parameter.is_constexpr]
    places = {fn.jit_function.params[at[0]].name: str(value) for at, value in constants.items()}
    return {name: places[name] for name in names if name in places}


def _no_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out


if __name__ == "__main__":
    main()
