"""Greedy and unfiltered Gumbel-max sampling; rows that are filtered are left to the reference.

A row's vocabulary is cut into blocks, one a program: their largest logits first, then, where rows have noise, their
largest scores, each packed with its id into one int64 that sorts by value first and by the lower id second. Shapes: as
in reference.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from divisi.kernels.pass_memory import Memory
from divisi.kernels.sampling import reference
from divisi.kernels.sampling.layout import Draws
from divisi.kernels.sampling.noise import row_keys

_BLOCK = 4096  # 32 values a thread of 4 warps; 38 programs a row of 152 k
_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def packed(b_value, i_v, V: tl.constexpr):
    """As integers they sort by value, and equals by the lower id; those past the last id come last."""
    b_bits = (b_value + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(i_v < V, (b_order.to(tl.int64) << 32) + (0x7FFFFFFF - i_v), -(2**63))


@triton.jit
def mixed(b_x):
    """lowbias32 (C. Wellons), as in noise.py."""
    b_x ^= b_x >> 16
    b_x *= 0x7FEB352D
    b_x ^= b_x >> 15
    b_x *= 0x846CA68B
    return b_x ^ (b_x >> 16)


@triton.jit
def gumbel(i_v, key_0, key_1):
    """The noise of token ids under a row's key; a log1p that keeps the digits of small values."""
    b_bits = mixed(mixed(i_v.to(tl.uint32) ^ key_0.to(tl.uint32, bitcast=True)) ^ key_1.to(tl.uint32, bitcast=True))
    b_u = tl.minimum(((b_bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * (2.0**-31), _BELOW_ONE)
    b_rest = 1.0 - b_u
    b_lost = 1.0 - b_rest
    b_log = tl.where(b_lost == 0.0, b_u, -tl.log(b_rest) * (b_u / tl.where(b_lost == 0.0, 1.0, b_lost)))
    return -tl.log(b_log)


@triton.jit(do_not_specialize=["blocks"])
def best_logit_fwd_kernel(p_logits, p_keys, blocks, V: tl.constexpr, BLOCK: tl.constexpr):
    i_b, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_v = i_b * BLOCK + tl.arange(0, BLOCK)
    b_logit = tl.load(p_logits + i_r * V + i_v, mask=i_v < V, other=float("-inf"))
    tl.store(p_keys + i_r * blocks + i_b, tl.max(packed(b_logit, i_v, V), 0))


@triton.jit
def best_of_row(p_keys, i_r, blocks, BLOCKS: tl.constexpr):
    """The largest of a row's packed values."""
    i_b = tl.arange(0, BLOCKS)
    return tl.max(tl.load(p_keys + i_r * blocks + i_b, mask=i_b < blocks, other=-(2**63)), 0)


@triton.jit(do_not_specialize=["blocks"])
def best_score_fwd_kernel(
    p_logits, p_best, p_temperature, p_least, p_seeds, p_keys, blocks,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """(logit - best) / temperature + noise of a block; a greedy row has a temperature of 0."""
    i_b, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(p_temperature + i_r)
    if temperature > 0:
        i_v = i_b * BLOCK + tl.arange(0, BLOCK)
        bits = (best_of_row(p_best, i_r, blocks, BLOCKS) >> 32).to(tl.int32)
        best = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        b_scaled = tl.load(p_logits + i_r * V + i_v, mask=i_v < V, other=float("-inf"))
        b_scaled = tl.div_rn(b_scaled - best, temperature + tl.zeros_like(b_scaled))
        b_scaled = tl.where(b_scaled < tl.load(p_least + i_r), float("-inf"), b_scaled)
        b_noise = gumbel(i_v, tl.load(p_seeds + 2 * i_r), tl.load(p_seeds + 2 * i_r + 1))
        tl.store(p_keys + i_r * blocks + i_b, tl.max(packed(b_scaled + b_noise, i_v, V), 0))


@triton.jit(do_not_specialize=["blocks"])
def choose_fwd_kernel(p_best, p_scores, p_temperature, p_ids, blocks, BLOCKS: tl.constexpr, NOISY: tl.constexpr):
    """The id that a row's largest value goes with."""
    i_r = tl.program_id(0).to(tl.int64)
    best = best_of_row(p_best, i_r, blocks, BLOCKS)
    if NOISY:
        score = best_of_row(p_scores, i_r, blocks, BLOCKS)
        best = tl.where(tl.load(p_temperature + i_r) > 0, score, best)
    tl.store(p_ids + i_r, 0x7FFFFFFF - (best & 0xFFFFFFFF))


def choose_tokens(logits_RV: Tensor, draws: Draws, positions_R: NDArray[np.int64], *, memory: Memory) -> Tensor:
    """See reference.py. Two launches for greedy rows, three where some are drawn."""
    if draws.filtered is not None or not len(positions_R):
        return reference.choose_tokens(logits_RV, draws, positions_R)
    assert logits_RV.is_contiguous()
    (rows, vocab), device = logits_RV.shape, logits_RV.device
    blocks = triton.cdiv(vocab, _BLOCK)
    shape = {"BLOCKS": triton.next_power_of_2(blocks)}
    best_RB, score_RB = (memory.empty((rows, blocks), torch.int64, device) for _ in range(2))
    ids_R = torch.empty(rows, dtype=torch.int64, device=device)
    best_logit_fwd_kernel[(blocks, rows)](logits_RV, best_RB, blocks, V=vocab, BLOCK=_BLOCK)
    temperature_R = None
    if draws.plain is not None:
        keys_R2 = _sent(row_keys(draws.seeds_R, positions_R), device)
        temperature_R = _sent(draws.temperature_R, device)
        best_score_fwd_kernel[(blocks, rows)](
            logits_RV, best_RB, temperature_R, _sent(draws.log_min_p_R, device), keys_R2, score_RB, blocks,
            V=vocab, BLOCK=_BLOCK, **shape,
        )  # fmt: skip
    choose_fwd_kernel[(rows,)](
        best_RB, score_RB, temperature_R, ids_R, blocks, NOISY=temperature_R is not None, num_warps=1, **shape
    )
    return ids_R


def _sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """On the device, without waiting for it: the driver has taken what is not pinned when the call returns."""
    return torch.from_numpy(values).to(device, non_blocking=True)
