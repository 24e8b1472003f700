"""Gated delta rule for decoding rows: replay, conv, gates, norms and recurrence of a head in one program.

The state block stays in registers from the slot's load to the last row. Replay and first run both end a token with
``fma(k, delta, s * g)``: left to itself the compiler contracts them differently, and a third of the replayed state
would differ in the last bit. Shapes: as in layout.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights
from divisi.kernels.gated_delta.triton_inputs import causal_conv, gated_norm_fwd_kernel, log_decay, rounded_product
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.pass_memory import Memory


@dataclass(frozen=True, slots=True)
class _Tiles:
    block_v: int
    warps: int


# 32 of 128 value columns are 16 KB of state in 128 registers of one warp: no sum waits at a barrier, and eight programs
# a multiprocessor keep loads in flight while others store. On an H100 114 us for 64 sequences; 64 columns of 2 warps
# take 120, of 4 warps 130, 16 of 1 warp 135, all of 8 warps 150; with 4 rows each 163, 209, 272, 250, 334
_DECODE = {Chip.A100: _Tiles(32, 1), Chip.H100: _Tiles(32, 1), Chip.B200: _Tiles(32, 1)}
_LEAST_K = 16  # several keys a lane, so that the sums over them need no rounded_product


@triton.jit
def replay(
    b_s, p_key, p_delta, p_decay, slot, position, upto, i_h, i_k, i_v,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Have a head's state absorb the ring's entries from ``position`` to ``upto``."""
    for i in range(position, upto):
        i_entry = slot * RING + i % RING
        b_k = tl.load(p_key + (i_entry * G + i_h // (H // G)) * K + i_k, mask=i_k < K, other=0.0)
        b_d = tl.load(p_delta + (i_entry * H + i_h) * V + i_v, mask=i_v < V, other=0.0)
        g = tl.load(p_decay + i_entry * H + i_h)
        b_s = tl.fma(b_k[:, None], b_d[None, :], b_s * g)
    return b_s


@triton.jit
def gated_delta_flush_fwd_kernel(
    p_state, p_key, p_delta, p_decay, p_position, p_slots, p_upto,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, RING: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_block, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_slots + i_n).to(tl.int64)
    position, upto = tl.load(p_position + slot), tl.load(p_upto + i_n)
    if position < upto:
        i_k, i_v = tl.arange(0, BLOCK_K), i_block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = (i_k < K)[:, None] & (i_v < V)[None, :]
        p_own = p_state + (slot * H + i_h) * K * V + i_k[:, None] * V + i_v[None, :]
        b_s = tl.load(p_own, mask=mask, other=0.0)
        b_s = replay(b_s, p_key, p_delta, p_decay, slot, position, upto, i_h, i_k, i_v, G, H, K, V, RING)
        tl.store(p_own, b_s, mask=mask)


@triton.jit
def gated_delta_decode_fwd_kernel(
    p_rows, p_taps, p_rate, p_dt_bias, p_state, p_conv, p_key, p_delta, p_decay, p_position,
    p_starts, p_lengths, p_slots, p_o, row_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_block, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(p_slots + i_s).to(tl.int64)
    first = tl.load(p_starts + i_s)
    num_rows = tl.load(p_starts + i_s + 1) - first
    C: tl.constexpr = 2 * G * K + H * V
    if (slot >= 0) & (num_rows > 0):
        i_g = i_h // (H // G)
        i_k = tl.arange(0, BLOCK_K)
        i_v = i_block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_k, mask_v = i_k < K, i_v < V
        mask = mask_k[:, None] & mask_v[None, :]
        length = tl.load(p_lengths + i_s)
        position = tl.load(p_position + slot)
        p_own = p_state + (slot * H + i_h) * K * V + i_k[:, None] * V + i_v[None, :]
        b_s = tl.load(p_own, mask=mask, other=0.0)
        if position < length:
            b_s = replay(b_s, p_key, p_delta, p_decay, slot, position, length, i_h, i_k, i_v, G, H, K, V, RING)
            tl.store(p_own, b_s, mask=mask)
        rate, dt_bias = tl.load(p_rate + i_h), tl.load(p_dt_bias + i_h)
        p_ring = p_conv + slot * RING * C
        i_cq, i_ck, i_cv = i_g * K + i_k, (G + i_g) * K + i_k, 2 * G * K + i_h * V + i_v
        owns_group = (i_block == 0) & (i_h % (H // G) == 0)
        for i in range(num_rows):
            i_entry = slot * RING + (length + i) % RING
            b_q = causal_conv(p_rows, p_ring, p_taps, i, first, length, i_cq, mask_k, row_stride, RING, C, W, BLOCK_W)
            b_k = causal_conv(p_rows, p_ring, p_taps, i, first, length, i_ck, mask_k, row_stride, RING, C, W, BLOCK_W)
            b_v = causal_conv(p_rows, p_ring, p_taps, i, first, length, i_cv, mask_v, row_stride, RING, C, W, BLOCK_W)
            b_q = b_q * tl.rsqrt(tl.sum(rounded_product(b_q, b_q), 0) + 1e-6) * (K**-0.5)
            b_k = b_k * tl.rsqrt(tl.sum(rounded_product(b_k, b_k), 0) + 1e-6)
            p_row = p_rows + (first + i).to(tl.int64) * row_stride
            beta = tl.sigmoid(tl.load(p_row + C + H * V + i_h).to(tl.float32))
            g = tl.exp(log_decay(tl.load(p_row + C + H * V + H + i_h), dt_bias, rate))
            b_sg = b_s * g
            b_d = beta * (b_v - tl.sum(b_sg * b_k[:, None], 0))
            b_s = tl.fma(b_k[:, None], b_d[None, :], b_sg)
            b_o = tl.sum(b_s * b_q[:, None], 0)
            tl.store(p_o + ((first + i).to(tl.int64) * H + i_h) * V + i_v, b_o, mask=mask_v)
            tl.store(p_delta + (i_entry * H + i_h) * V + i_v, b_d, mask=mask_v)
            b_raw_v = tl.load(p_row + i_cv, mask=mask_v, other=0.0).to(tl.float32)
            tl.store(p_conv + i_entry * C + i_cv, b_raw_v, mask=mask_v)
            if i_block == 0:
                tl.store(p_decay + i_entry * H + i_h, g)
            if owns_group:
                tl.store(p_key + (i_entry * G + i_g) * K + i_k, b_k, mask=mask_k)
                b_raw_q = tl.load(p_row + i_cq, mask=mask_k, other=0.0).to(tl.float32)
                tl.store(p_conv + i_entry * C + i_cq, b_raw_q, mask=mask_k)
                b_raw_k = tl.load(p_row + i_ck, mask=mask_k, other=0.0).to(tl.float32)
                tl.store(p_conv + i_entry * C + i_ck, b_raw_k, mask=mask_k)


def gated_delta_decode(
    rows_TP: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    starts_S1: Tensor,
    lengths_S: Tensor,
    slots_S: Tensor,
    *,
    chip: Chip,
    memory: Memory,
) -> Tensor:
    """See reference.py. Slot -1 and sequences without rows touch nothing; rows past the last sequence's are zero."""
    assert rows_TP.stride(1) == 1
    dims, tiles, tokens, runs = DeltaDims.of(state), _DECODE[chip], rows_TP.shape[0], slots_S.shape[0]
    heads, value_dim = dims.value_heads, dims.value_dim
    o_THV = memory.empty((tokens, heads, value_dim), torch.float32, rows_TP.device)
    out_TX = memory.empty((tokens, heads * value_dim), rows_TP.dtype, rows_TP.device)
    block_v = min(tiles.block_v, triton.next_power_of_2(value_dim))
    block_k, taps = max(triton.next_power_of_2(dims.key_dim), _LEAST_K), weights.conv_WC.shape[0]
    gated_delta_decode_fwd_kernel[(triton.cdiv(value_dim, block_v), heads, runs)](
        rows_TP, weights.conv_WC, weights.rate_H, weights.dt_bias_H,
        state.state_SHKV, state.conv_SRC, state.key_SRGK, state.delta_SRHV, state.decay_SRH, state.position_S,
        starts_S1, lengths_S, slots_S, o_THV, rows_TP.stride(0),
        G=dims.key_heads, H=heads, K=dims.key_dim, V=value_dim, W=taps, RING=state.ring,
        BLOCK_K=block_k, BLOCK_V=block_v, BLOCK_W=triton.next_power_of_2(taps), num_warps=tiles.warps,
    )  # fmt: skip
    block_h = min(8, triton.next_power_of_2(heads))
    gated_norm_fwd_kernel[(tokens, triton.cdiv(heads, block_h))](
        o_THV, rows_TP, weights.norm_V, out_TX, state.position_S, starts_S1, lengths_S, slots_S,
        runs, rows_TP.stride(0), weights.eps, H=heads, V=value_dim, Z=dims.conv_channels,
        BLOCK_H=block_h, BLOCK_V=triton.next_power_of_2(value_dim), num_warps=2,
    )  # fmt: skip
    return out_TX


def gated_delta_flush(state: DeltaState, slots_N: Tensor, upto_N: Tensor, *, chip: Chip) -> None:
    """See reference.py; the bits of a replay before decoding rows."""
    dims, tiles = DeltaDims.of(state), _DECODE[chip]
    block_v = min(tiles.block_v, triton.next_power_of_2(dims.value_dim))
    gated_delta_flush_fwd_kernel[(triton.cdiv(dims.value_dim, block_v), dims.value_heads, slots_N.shape[0])](
        state.state_SHKV, state.key_SRGK, state.delta_SRHV, state.decay_SRH, state.position_S, slots_N, upto_N,
        G=dims.key_heads, H=dims.value_heads, K=dims.key_dim, V=dims.value_dim, RING=state.ring,
        BLOCK_K=max(triton.next_power_of_2(dims.key_dim), _LEAST_K), BLOCK_V=block_v, num_warps=tiles.warps,
    )  # fmt: skip
    # apart from the kernel, whose programs read the positions
    state.position_S[slots_N] = torch.maximum(state.position_S[slots_N], upto_N)
