"""``python -m divisi.benchmarks.gpu.ahead [--chips 80,90] [DIR]``: compile the Triton kernels ahead, without a GPU.

For the published shapes, as production launches them: its own host code runs on the CPU, and each launch is compiled
instead of run. Other shapes are compiled at first use. Whether a GPU finds and runs what lies here was never tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import cast
from unittest import mock

import torch
import triton
from torch import Tensor

from divisi.benchmarks.gpu import cases, mixture_cases, sampling_cases, stub_driver
from divisi.benchmarks.gpu.cases import Case, Draw
from divisi.benchmarks.gpu.shapes import DELTA, HEADS, PUBLISHED
from divisi.cluster.dispatch.local import LocalEnd
from divisi.kernels.gpu.ahead import BUILT_AHEAD
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import Kernels, assembled
from divisi.model.batch import StepBatch
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank
from divisi.model.placement import deal, whole_share
from divisi.model.runner import ModelRunner
from divisi.model.state import StateStore
from divisi.model.warm_up import decode_batch, prefill_batch
from divisi.model.weights import load_weights

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CHIPS = {80: Chip.A100, 90: Chip.H100, 100: Chip.B200, 103: Chip.B200}
"""By compute capability."""
DECODED = [([1], 4), ([1] * 2, 40), ([4], 4), ([4] * 16, 64), ([1] * 64, 3000)]
"""Rows of the sequences, and pages of the longest one: steps after which no other decode step compiles anything."""
SCANNED = [[1], [16], [70, 10], [5, 700], [1500], [2048] * 2]
"""Likewise of prefill steps; by the size of the step, kernels take other tiles."""
SLOTS = 64
SHARDED = (2, 3, 4, 8)
"""Numbers of shards."""

_experts = partial(cases.routed_experts, chosen=10, experts=32, width=2048, inner=512)
_decode = partial(cases.attention, operation="attention_decode", heads=HEADS)
LAUNCHED: Mapping[str, Sequence[Callable[..., Case]]] = {
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
"""By operation: cases that among them launch every kernel in every configuration."""


class Ones(Draw):
    """Numbers do not matter here, and drawing them takes long."""

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """See Draw."""
        return torch.ones(size, dtype=dtype or self.dtype)


class EmptyCheckpoint:
    """Tensors of any shape, without bytes."""

    bytes_read = 0
    device = CPU

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See Checkpoint."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def read_experts(
        self, layer: int, ids: Sequence[int], config: ModelConfig, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See Checkpoint."""
        width, inner = config.hidden_size, config.moe_intermediate_size
        shapes = (len(ids), 2 * inner, width), (len(ids), width, inner)
        gate_up_EFD, down_EDI = (self.read("", shape, dtype) for shape in shapes)
        return gate_up_EFD, down_EDI


class Published:
    """Four layers of the published shape and that of MTP, on CPU tensors, whose addresses are real.

    Under the stub driver, and without the vendor's products, nothing is computed: what passes give means nothing.
    """

    def __init__(self, kernels: Kernels) -> None:
        config = ModelConfig.from_hf(PUBLISHED | {"num_hidden_layers": 4}, 1)
        checkpoint = cast(Checkpoint, EmptyCheckpoint())
        store = StateStore(config, num_pages=2, page_size=16, num_slots=SLOTS, max_rows=4, dtype=BF16, device=CPU)
        bank = ExpertBank.load(checkpoint, config, whole_share(config), kernels, BF16, CPU)
        self._kernels, self._config, self._checkpoint = kernels, config, checkpoint
        self.end = LocalEnd(bank)
        self.runner = ModelRunner(config, load_weights(checkpoint, config, kernels, BF16, CPU), store, kernels)
        assert self.runner._mtp is not None, "the configuration has an MTP layer"
        self.runner._activation_dtype = self.runner._mtp._dtype = BF16  # as on a GPU

    @torch.inference_mode()
    def decode(self, rows: Sequence[int], pages: int) -> None:
        """A step of decoding sequences."""
        self._forward(decode_batch(rows, pages, CPU, padded=True))

    @torch.inference_mode()
    def scan(self, rows: Sequence[int]) -> None:
        """A step of prefilling ones."""
        self._forward(prefill_batch(rows, 16, CPU))

    @torch.inference_mode()
    def share(self, shards: int, tokens: int) -> None:
        """A step's rows of one layer in a shard."""
        share = deal(self._config.num_experts, shards)[0]
        bank = ExpertBank.load(self._checkpoint, self._config, share, self._kernels, BF16, CPU)
        chosen = tokens, self._config.num_experts_per_tok
        ids_TK = torch.zeros(chosen, dtype=torch.int32)
        bank.partial_sum(0, torch.empty((tokens, self._config.hidden_size), dtype=BF16), ids_TK, torch.ones(chosen))

    def _forward(self, batch: StepBatch) -> None:
        with mock.patch.object(torch, "mm", no_product):
            self.runner.forward(batch, self.end)


def no_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """In place of torch.mm, where nothing is computed."""
    return out


def compile_for(arch: int, folder: Path) -> int:
    """Launch what production launches; returns the number of kernels. Wants a process of its own."""
    triton.knobs.cache.dir, triton.knobs.compilation.store_binary_only = str(folder), True
    stub = stub_driver.install(arch)
    kernels = assembled({"triton": triton_operations(CHIPS[arch])}, "triton")
    for operation, made in LAUNCHED.items():
        for make in made:
            make(Ones(0, BF16, CPU), operation).run(kernels)
    model = Published(kernels)
    for _ in range(2):  # the second time from the pass's own memory
        for rows, pages in DECODED:
            model.decode(rows, pages)
    for rows in SCANNED:
        model.scan(rows)
    for shards in SHARDED:
        for rows in (*(rows for rows, _ in DECODED), *SCANNED):
            model.share(shards, sum(rows))
    return len(stub.kernels)


def _chips(text: str) -> list[int]:
    if unknown := [part for part in text.split(",") if part not in map(str, CHIPS)]:
        raise argparse.ArgumentTypeError(f"no kernels for {', '.join(unknown)}; there are those for {[*CHIPS]}")
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Compile for each chip in a process of its own, since a process has one driver."""
    parser = argparse.ArgumentParser(prog="python -m divisi.benchmarks.gpu.ahead", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=BUILT_AHEAD, help=f"default: {BUILT_AHEAD}")
    parser.add_argument("--chips", type=_chips, default=list(CHIPS), help="default: %(default)s")
    options = parser.parse_args()
    for arch in options.chips:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            count = process.submit(compile_for, arch, options.folder.resolve()).result()
        print(f"sm_{arch}: {count} kernels, which no GPU has run from here", flush=True)


if __name__ == "__main__":
    main()
