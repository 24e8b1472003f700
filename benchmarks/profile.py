"""`python -m divisi.benchmarks profile`: where a step's time goes, by operation, beside what the machine can do.

The engine runs in this process with a clock around every kernel, which costs some microseconds a call. Ceilings are
measured in the same run: bytes per second that all threads read, and FLOP/s of the widest product of the kernels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.contenders import DivisiEngine
from divisi.benchmarks.model import bench_model
from divisi.cluster import assembly
from divisi.kernels.choice import OPERATIONS, kernels_here
from divisi.kernels.native.fused import Fused
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.config import ModelConfig
from divisi.model.packing import matrices_of_a_token

_CELLS = (("decode", 1), ("decode", 4), ("decode", 16), ("decode", 32), ("prefill", 512), ("prefill", 4096))
_STEPS = 32
_ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `profile` is told on the command line."""
    parser.add_argument("--model", type=Path, help="a checkpoint; by default bench-s with random weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(options.threads)
    print(f"{machine.describe()}; {options.threads} threads; kernels: {kernels_here('auto', 'cpu')}")
    with tempfile.TemporaryDirectory() as scratch:
        path, clock = bench_model(options.model, Path(scratch)), _Clock()
        with mock.patch.object(assembly, "select_kernels", clock.select):
            engine = DivisiEngine.local(path, "bfloat16")
        config = ModelConfig.load(path)
        for kind, size in _CELLS:
            bandwidth, gemm = machine.read_bandwidth(options.threads), gemm_rate()
            seconds, by_operation = min((_round(engine, clock, kind, size) for _ in range(_ROUNDS)), key=lambda r: r[0])
            longest = list(by_operation.items())[:6]
            shares = ", ".join(f"{name} {100 * spent / seconds:.0f} %" for name, spent in longest)
            rest = 100 * (1 - sum(by_operation.values()) / seconds)
            told = f"{kind} {size}: {seconds * 1e3:.2f} ms; {shares}, the rest {rest:.0f} %"
            if (kind, size) == ("decode", 1):
                moved = token_bytes(config) / seconds
                told += f"; {moved / 1e9:.1f} GB/s, {100 * moved / bandwidth:.0f} % of {bandwidth / 1e9:.1f}"
            if kind == "prefill":
                rate = prefill_flops(config, size) / seconds
                told += f"; {rate / 1e9:.0f} GFLOP/s, {100 * rate / gemm:.0f} % of {gemm / 1e9:.0f}"
            print(told, flush=True)
    return 0


class _Clock:
    """Time by operation."""

    def __init__(self) -> None:
        self.spent_ns: Counter[str] = Counter()

    def select(self, *arguments: Any, **options: Any) -> Kernels:
        kernels = select_kernels(*arguments, **options)
        for name in OPERATIONS:
            setattr(kernels, name, self.timed(name, getattr(kernels, name)))
        if kernels.fused is not None:
            kernels.fused = cast(Fused, _TimedFused(kernels.fused, self))
        return kernels

    def timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter_ns()
            result = operation(*arguments)
            self.spent_ns[name] += time.perf_counter_ns() - start
            return result

        return timed


class _TimedFused:
    """Makes fused operations with a clock."""

    def __init__(self, fused: Fused, clock: _Clock) -> None:
        self._fused, self._clock = fused, clock

    def __getattr__(self, name: str) -> Callable[..., Any]:
        make = getattr(self._fused, name)

        def made(*arguments: Any, **options: Any) -> Any:
            found = make(*arguments, **options)
            return self._clock.timed(name, found) if callable(found) else found

        return made


def _round(engine: DivisiEngine, clock: _Clock, kind: str, size: int) -> tuple[float, dict[str, float]]:
    """Seconds of a step, or of a prefill, and of its operations, the longest first."""
    clock.spent_ns.clear()
    if kind == "prefill":
        seconds, steps = engine.prefill(size), 1
    else:
        seconds, steps = engine.decode(size, _STEPS, clock.spent_ns.clear) / _STEPS, _STEPS
    return seconds, {name: spent / steps / 1e9 for name, spent in clock.spent_ns.most_common()}


def gemm_rate() -> float:
    """FLOP/s of 512 rows of bf16 weights, the best of five."""
    rows, width = 512, 1024
    kernels = select_kernels(torch.device("cpu"))
    x, weight = torch.randn(rows, width), kernels.pack_linear(torch.randn(width, width).bfloat16())
    times = []
    for _ in range(6):
        start = time.perf_counter()
        kernels.linear(x, weight)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * width / min(times[1:])


def token_bytes(config: ModelConfig) -> int:
    """Bytes that a decoded token must move: weights in bf16, states in and out in fp32; its KV is left out."""
    heads = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    head = config.vocab_size * config.hidden_size
    return 2 * (matrices_of_a_token(config) + head) + 2 * 4 * heads * len(config.linear_layers)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of a prompt: weights for every token, attention to those before it, the head once; the delta rule is left out."""
    attention = 2 * tokens * tokens * config.num_attention_heads * config.head_dim * len(config.full_layers)
    return 2 * (tokens * matrices_of_a_token(config) + config.vocab_size * config.hidden_size) + attention
