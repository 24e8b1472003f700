"""`python -m divisi.benchmarks profile`: where a step's time goes, by operation, beside what the machine can do.

The engine runs in this process, by turns as it is, for the time of a step, and with a clock around every kernel, for
the shares. Ceilings are measured before each turn: bytes per second that all threads read, and FLOP/s of a wide product
of the kernels or of torch, the faster one. Fractions are medians of the turns, each of its own ceilings.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast
from unittest import mock

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.contenders import DivisiEngine
from divisi.benchmarks.model import bench_model
from divisi.cluster import assembly
from divisi.cluster.dispatch.local import LocalEnd
from divisi.kernels.choice import OPERATIONS, kernels_here
from divisi.kernels.native.fused import Fused
from divisi.kernels.select import Kernels, select_kernels
from divisi.model.config import ModelConfig
from divisi.model.footprint.packing import matrices_of_a_token

_CELLS = (("decode", 1), ("decode", 4), ("decode", 16), ("decode", 32), ("prefill", 512), ("prefill", 4096))
_STEPS = 32
_ROUNDS = 7


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
        engine = DivisiEngine.local(path, "bfloat16")
        with mock.patch.object(assembly, "select_kernels", clock.select):
            clocked = DivisiEngine.local(path, "bfloat16", _LayerByLayer)
        config = ModelConfig.load(path)
        for kind, size in _CELLS:
            turns = [_Turn.of(engine, clocked, clock, kind, size, options.threads) for _ in range(_ROUNDS)]
            print(_told(kind, size, turns, config), flush=True)
    return 0


class _LayerByLayer(LocalEnd):
    """Has passes go operation by operation under the clock: one call for all layers would be one line."""

    bank = None


@dataclass(frozen=True, slots=True)
class _Turn:
    """Ceilings, the time of a step or of a prefill, and a second one by operation."""

    bandwidth: float
    """Bytes per second."""
    gemm: float
    """FLOP/s."""
    seconds: float
    clocked: float
    """Seconds under the clock."""
    by_operation: dict[str, float]
    """Seconds, the longest first."""

    @classmethod
    def of(
        cls, engine: DivisiEngine, clocked: DivisiEngine, clock: _Clock, kind: str, size: int, threads: int
    ) -> Self:
        ceilings = machine.read_bandwidth(threads), gemm_rate()
        seconds, under_clock = (_seconds(each, clock, kind, size) for each in (engine, clocked))
        steps = 1 if kind == "prefill" else _STEPS
        return cls(*ceilings, seconds, under_clock, {name: t / steps / 1e9 for name, t in clock.spent_ns.most_common()})


def _told(kind: str, size: int, turns: Sequence[_Turn], config: ModelConfig) -> str:
    seconds = [turn.seconds for turn in turns]
    shown = min(turns, key=lambda turn: turn.clocked)
    longest = list(shown.by_operation.items())[:6]
    shares = ", ".join(f"{name} {100 * spent / shown.clocked:.0f} %" for name, spent in longest)
    rest = 100 * (1 - sum(shown.by_operation.values()) / shown.clocked)
    told = f"{kind} {size}: {_range([value * 1e3 for value in seconds], '.2f')} ms; {shares}, the rest {rest:.0f} %"
    if (kind, size) == ("decode", 1):
        moved = token_bytes(config)
        fractions = [100 * moved / turn.seconds / turn.bandwidth for turn in turns]
        ceiling = _range([turn.bandwidth / 1e9 for turn in turns], ".1f")
        told += f"; {moved / statistics.median(seconds) / 1e9:.1f} GB/s, {_range(fractions, '.0f')} % of {ceiling}"
    if kind == "prefill":
        flops = prefill_flops(config, size)
        fractions = [100 * flops / turn.seconds / turn.gemm for turn in turns]
        ceiling = _range([turn.gemm / 1e9 for turn in turns], ".0f")
        told += f"; {flops / statistics.median(seconds) / 1e9:.0f} GFLOP/s, {_range(fractions, '.0f')} % of {ceiling}"
    return told


def _range(values: Sequence[float], form: str) -> str:
    """Median, and the lowest and highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _seconds(engine: DivisiEngine, clock: _Clock, kind: str, size: int) -> float:
    clock.spent_ns.clear()
    if kind == "prefill":
        return engine.prefill(size)
    return engine.decode(size, _STEPS, clock.spent_ns.clear) / _STEPS


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


def gemm_rate() -> float:
    """FLOP/s of 512 rows of bf16 weights, the best of five of the kernels' product and of torch's."""
    rows, width = 512, 1024
    kernels = select_kernels(torch.device("cpu"))
    x, weight = torch.randn(rows, width), torch.randn(width, width).bfloat16()
    packed, rounded = kernels.pack_linear(weight), x.bfloat16()
    products: tuple[Callable[[], object], ...] = (
        lambda: kernels.linear(x, packed),
        lambda: torch.nn.functional.linear(rounded, weight),
    )
    times = []
    for product in products:
        product()
        for _ in range(5):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return 2 * rows * width * width / min(times)


def token_bytes(config: ModelConfig) -> int:
    """Bytes that a decoded token must move: weights in bf16, states in and out in fp32; its KV is left out."""
    heads = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    head = config.vocab_size * config.hidden_size
    return 2 * (matrices_of_a_token(config) + head) + 2 * 4 * heads * len(config.linear_layers)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """Of a prompt: weights for every token, attention to those before it, the head once; the delta rule is left out."""
    attention = 2 * tokens * tokens * config.num_attention_heads * config.head_dim * len(config.full_layers)
    return 2 * (tokens * matrices_of_a_token(config) + config.vocab_size * config.hidden_size) + attention
