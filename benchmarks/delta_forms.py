"""`python -m divisi.benchmarks delta`: prefill of the delta rule as a recurrence, beside its chunked matrix form.

The recurrence is the C++ kernel, conv, gates and norm included. Of the chunked form there are two numbers: the
reference as it stands, and the least that any could take, its products alone at the rate of a large product measured in
the same run (fp32; bf16, which would round what meets the state), without exponentials, conv or norm. One thread; the
best of five.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from divisi.benchmarks import machine
from divisi.benchmarks.profile import gemm_rate
from divisi.kernels.choice import kernels_here
from divisi.kernels.gated_delta.chunked import chunked_scan
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves, ring_entries
from divisi.kernels.select import Kernels, select_kernels

HEADS = ((8, 64), (16, 128), (32, 128))
"""Value heads (half as many key heads) and head dims: bench-s, bench-m, Qwen3-Next."""
LENGTHS = (16, 64, 256, 1024, 4096)
CHUNK = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `delta` is told on the command line."""
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a run")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    torch.set_num_threads(1)
    kernels = select_kernels(torch.device("cpu"))
    fp32, bf16 = _fp32_rate(), gemm_rate()
    print(f"{machine.describe()}; 1 thread; kernels: {kernels_here('auto', 'cpu')}")
    print(f"products at {fp32 / 1e9:.0f} GFLOP/s in fp32, {bf16 / 1e9:.0f} in bf16; chunks of {CHUNK}\n")
    print("| heads x dim | tokens | recurrence, us | chunked reference, us | its products alone, fp32 | bf16 |")
    print("|---|---|---|---|---|---|")
    for heads, dim in HEADS:
        for tokens in options.lengths:
            times = recurrence(kernels, heads, dim, tokens), chunked(heads, dim, tokens)
            least = [chunked_flops(heads, dim, tokens) / rate for rate in (fp32, bf16)]
            shown = " | ".join(f"{seconds * 1e6:,.0f}" for seconds in (*times, *least))
            print(f"| {heads} x {dim} | {tokens} | {shown} |", flush=True)
    return 0


def recurrence(kernels: Kernels, heads: int, dim: int, tokens: int) -> float:
    """Seconds of the kernel for one run that leaves one state."""
    keys, ring = heads // 2, ring_entries(1, 4)
    channels = 2 * keys * dim + heads * dim
    state = DeltaState(
        torch.zeros(2, heads, dim, dim), torch.zeros(2, ring, channels), torch.zeros(2, ring, keys, dim),
        torch.zeros(2, ring, heads, dim), torch.ones(2, ring, heads), torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    weights = DeltaWeights(torch.randn(4, channels) / 2, -torch.rand(heads), torch.zeros(heads), torch.ones(dim), 1e-6)
    rows, starts = torch.randn(tokens, channels + heads * dim + 2 * heads), torch.tensor([0, tokens]).int()
    leaves = Leaves(torch.tensor([0, 1]).int(), torch.tensor([tokens]).int(), torch.tensor([1]).int())
    start, none = torch.zeros(1).int(), torch.full((1,), -1).int()
    return _best(lambda: kernels.gated_delta_prefill(rows, weights, state, starts, start, none, leaves))


def chunked(heads: int, dim: int, tokens: int) -> float:
    """Seconds of the reference's scan."""
    q, k = (torch.nn.functional.normalize(torch.randn(tokens, heads // 2, dim), dim=-1) for _ in range(2))
    v, beta, decay = torch.randn(tokens, heads, dim), torch.rand(tokens, heads), torch.rand(tokens, heads)
    return _best(lambda: chunked_scan(q, k, v, beta, decay, torch.zeros(heads, dim, dim), CHUNK))


def chunked_flops(heads: int, dim: int, tokens: int) -> int:
    """Of the products: three with the state; in a chunk half of K K^T, of Q K^T, of the solve and of the outputs."""
    return 2 * heads * tokens * (3 * dim * dim + 4 * min(CHUNK, tokens) * dim // 2)


def _fp32_rate() -> float:
    x, weight = torch.randn(512, 1024), torch.randn(1024, 1024)
    return 2 * 512 * 1024 * 1024 / _best(lambda: torch.nn.functional.linear(x, weight))


def _best(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
