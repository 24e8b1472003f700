"""Gated delta rule over the scan runs of a step, chunk by chunk as in chunked.py.

Five launches: conv and norms of all rows; what each chunk can compute before it knows its state; the scan over each
run's chunks, which is all that has to wait for another chunk, and leaves states; the outputs of each chunk; the conv
inputs and positions of the states left. A chunk is 64 rows from its run's first on; a state may be left in the middle
of one, since a row's delta depends on the rows before it only.
Shapes: as in layout.py and chunked.py; B chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights, Leaves
from divisi.kernels.gated_delta.triton_inputs import gated_norm, log_decay
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.runs import block_of_run, run_of_row

_CHUNK = 64
_CONV_ROWS = 32
_COPY_CHANNELS = 1024


@dataclass(frozen=True, slots=True)
class _Tiles:
    block_v: int
    warps: int
    stages: int


# the scan: 32 columns make 128 programs of a run's 32 heads; a chunk's inputs are 72 KB, so an H100 loads one ahead.
# One stage on sm_100: with more, state that is carried through products in a loop has been seen to race there (triton
# issue 10590)
_SCAN = {Chip.A100: _Tiles(32, 4, 2), Chip.H100: _Tiles(32, 4, 2), Chip.B200: _Tiles(32, 4, 1)}


@triton.jit
def gated_delta_conv_fwd_kernel(
    p_rows, p_taps, p_conv, p_starts, p_lengths, p_sources, p_qk, p_v, num_runs, row_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Causal conv, SiLU, and unit length for queries and keys, of one head of any kind; queries scaled by K^-1/2."""
    i_head = tl.program_id(0)
    i_s, i_first = block_of_run(p_starts, num_runs, tl.program_id(1), BLOCK_T)
    C: tl.constexpr = 2 * G * K + H * V
    if i_s >= 0:
        is_v = i_head >= 2 * G
        i_c = tl.where(is_v, 2 * G * K + (i_head - 2 * G) * V, i_head * K)
        first = tl.load(p_starts + i_s)
        num_rows = tl.load(p_starts + i_s + 1) - first
        length = tl.load(p_lengths + i_s)
        source = tl.load(p_sources + i_s).to(tl.int64)
        i_d = tl.arange(0, BLOCK_C)
        mask_c = (i_d < tl.where(is_v, V, K))[None, :]
        i_t = i_first + tl.arange(0, BLOCK_T)
        mask = (i_t < num_rows)[:, None] & mask_c
        b_x = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for w in tl.static_range(W):
            i_from = i_t - (W - 1 - w)
            p_new = p_rows + (first + i_from).to(tl.int64)[:, None] * row_stride + i_c + i_d[None, :]
            b_in = tl.load(p_new, mask=mask & (i_from >= 0)[:, None], other=0.0).to(tl.float32)
            position = length + i_from
            p_old = p_conv + (source * RING + (position + RING) % RING)[:, None] * C + i_c + i_d[None, :]
            b_in += tl.load(p_old, mask=mask & ((i_from < 0) & (position >= 0) & (source >= 0))[:, None], other=0.0)
            b_x += b_in * tl.load(p_taps + w * C + i_c + i_d, mask=i_d < tl.where(is_v, V, K), other=0.0)[None, :]
        b_x = b_x * tl.sigmoid(b_x)
        i_row = (first + i_t).to(tl.int64)[:, None]
        if is_v:
            tl.store(p_v + (i_row * H + i_head - 2 * G) * V + i_d[None, :], b_x, mask=mask)
        else:
            b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None] * tl.where(i_head < G, K**-0.5, 1.0)
            tl.store(p_qk + (i_row * 2 * G + i_head) * K + i_d[None, :], b_x, mask=mask)


@triton.jit
def unit_lower_inverse(b_lower, i_t, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)^-1 of a strictly lower triangular L, from blocks of 1 to the whole.

    [[A, 0], [C, B]]^-1 is [[A^-1, 0], [-B^-1 C A^-1, B^-1]]: only true inverses of parts occur, while powers of L, of
    which there is a shorter product, grow without bound when keys repeat.
    """
    i_r, i_c = i_t[:, None], i_t[None, :]
    b_inverse = tl.where(i_r == i_c, 1.0, 0.0) - tl.where((i_r // 2 == i_c // 2) & (i_r > i_c), b_lower, 0.0)
    size = 2
    while size < SIZE:
        below = (i_r // (2 * size) == i_c // (2 * size)) & (i_r // size != i_c // size)
        b_part = tl.dot(tl.where(below, b_lower, 0.0), b_inverse, input_precision=PRECISION)
        b_inverse = b_inverse - tl.dot(b_inverse, b_part, input_precision=PRECISION)
        size *= 2
    return b_inverse


@triton.jit
def gated_delta_chunk_fwd_kernel(
    p_rows, p_rate, p_dt_bias, p_qk, p_v, p_starts, p_w, p_u, p_within, p_log, p_turned, num_runs, row_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: u and w with delta = u - w S, the decayed q k^T, the sums of log decay, and k^T.

    What chunks hand on is stored chunk by chunk, without gaps and with dims rounded up to powers of two.
    """
    i_h = tl.program_id(0)
    i_s, i_first = block_of_run(p_starts, num_runs, tl.program_id(1), BLOCK_T)
    C: tl.constexpr = 2 * G * K + H * V
    if i_s >= 0:
        first = tl.load(p_starts + i_s)
        i_t = tl.arange(0, BLOCK_T)
        held = i_first + i_t < tl.load(p_starts + i_s + 1) - first
        i_row = (first + i_first).to(tl.int64)
        i_own = (tl.program_id(1).to(tl.int64) * H + i_h) * BLOCK_T
        i_k, i_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        p_gate = p_rows + i_row * row_stride + C + H * V + i_h + i_t.to(tl.int64) * row_stride
        b_beta = tl.where(held, tl.sigmoid(tl.load(p_gate, mask=held, other=0.0).to(tl.float32)), 0.0)
        b_a = tl.load(p_gate + H, mask=held, other=0.0)
        b_log = tl.where(held, log_decay(b_a, tl.load(p_dt_bias + i_h), tl.load(p_rate + i_h)), 0.0)
        b_log = tl.cumsum(b_log, 0)
        tl.store(p_log + i_own + i_t, b_log)
        mask_k = held[:, None] & (i_k < K)[None, :]
        p_query = p_qk + (i_row * 2 * G + i_h // (H // G)) * K + (i_t[:, None] * 2 * G * K + i_k[None, :])
        b_k = tl.load(p_query + G * K, mask=mask_k, other=0.0)
        b_q = tl.load(p_query, mask=mask_k, other=0.0)
        if i_h % (H // G) == 0:  # a tf32 operand must be contiguous along the summed axis
            i_group = tl.program_id(1).to(tl.int64) * G + i_h // (H // G)
            tl.store(p_turned + i_group * BLOCK_K * BLOCK_T + (i_k[None, :] * BLOCK_T + i_t[:, None]), b_k)
        # masked before the exponential: above the diagonal it would overflow
        lower = i_t[:, None] >= i_t[None, :]
        b_ratio = tl.where(lower, tl.exp(tl.where(lower, b_log[:, None] - b_log[None, :], 0.0)), 0.0)
        b_within = b_ratio * tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        tl.store(p_within + i_own * BLOCK_T + (i_t[:, None] * BLOCK_T + i_t[None, :]), b_within)
        b_lower = b_beta[:, None] * b_ratio * tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_lower = tl.where(i_t[:, None] > i_t[None, :], b_lower, 0.0)
        b_inverse = unit_lower_inverse(b_lower, i_t, BLOCK_T, "tf32x3")
        b_k = tl.load(p_query + G * K, mask=mask_k, other=0.0)  # again: held so long it would spill
        b_w = tl.dot(b_inverse, b_k * (b_beta * tl.exp(b_log))[:, None], input_precision=PRECISION)
        tl.store(p_w + i_own * BLOCK_K + (i_t[:, None] * BLOCK_K + i_k[None, :]), b_w)
        p_value = p_v + (i_row * H + i_h) * V + (i_t[:, None] * H * V + i_v[None, :])
        b_v = tl.load(p_value, mask=held[:, None] & (i_v < V)[None, :], other=0.0)
        b_u = tl.dot(b_inverse, b_v * b_beta[:, None], input_precision=PRECISION)
        tl.store(p_u + i_own * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :]), b_u)


@triton.jit
def gated_delta_scan_fwd_kernel(
    d_turned, d_w, d_u, p_delta, p_log, p_before, p_state, p_starts, p_lengths, p_sources,
    p_leaf_starts, p_leaf_positions, p_leaf_slots,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One run and head, some value columns, from leaf to leaf: deltas, and the state before each chunk.

    Tiles come through descriptors, since per-thread addresses of three tiles would spill. Rows past a run's end hold
    anything.
    """
    i_column, i_h, i_s = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2)
    i_block = 0
    for i in range(i_s):
        i_block += tl.cdiv(tl.load(p_starts + i + 1) - tl.load(p_starts + i), BLOCK_T)
    has_rows = tl.load(p_starts + i_s + 1) > tl.load(p_starts + i_s)
    length = tl.load(p_lengths + i_s)
    source = tl.load(p_sources + i_s).to(tl.int64)
    i_t, i_k, i_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), i_column + tl.arange(0, COLUMNS)
    mask = (i_k < K)[:, None] & (i_v < V)[None, :]
    i_own = i_h * K * V + (i_k[:, None] * V + i_v[None, :])
    b_s = tl.load(p_state + source * H * K * V + i_own, mask=mask & (source >= 0), other=0.0)
    done = 0
    if has_rows:
        for i_leaf in range(tl.load(p_leaf_starts + i_s), tl.load(p_leaf_starts + i_s + 1)):
            rows = tl.load(p_leaf_positions + i_leaf) - length
            b_last = b_s
            for i in tl.range(done, tl.cdiv(rows, BLOCK_T), num_stages=STAGES):
                b_last = b_s
                limit = tl.minimum(rows - i * BLOCK_T, BLOCK_T)
                i_tile = (i_block + i) * H + i_h
                b_w = d_w.load([i_tile * BLOCK_T, 0])
                b_u = d_u.load([i_tile * BLOCK_T, i_column])
                b_key = d_turned.load([((i_block + i) * G + i_h // (H // G)) * BLOCK_K, 0])
                b_log = tl.load(p_log + i_tile.to(tl.int64) * BLOCK_T + i_t)
                last = tl.load(p_log + i_tile.to(tl.int64) * BLOCK_T + limit - 1)
                tl.store(
                    p_before + i_tile.to(tl.int64) * BLOCK_K * BLOCK_V + (i_v[None, :] * BLOCK_K + i_k[:, None]), b_s
                )
                b_d = b_u - tl.dot(b_w, b_s, input_precision=PRECISION)
                tl.store(
                    p_delta + i_tile.to(tl.int64) * BLOCK_T * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :]), b_d
                )
                b_left = tl.where((i_t < limit)[:, None], b_d * tl.exp(tl.minimum(last - b_log, 0.0))[:, None], 0.0)
                b_s = b_s * tl.exp(last) + tl.dot(b_key, b_left, input_precision=PRECISION)
            slot = tl.load(p_leaf_slots + i_leaf).to(tl.int64)
            tl.store(p_state + slot * H * K * V + i_own, b_s, mask=mask & (slot >= 0))
            done = rows // BLOCK_T  # a chunk that the leaf cuts is done again, whole
            if rows % BLOCK_T != 0:
                b_s = b_last


@triton.jit
def gated_delta_output_fwd_kernel(
    p_rows, p_norm, p_qk, p_delta, p_within, p_log, p_before, p_starts, p_out, num_runs, row_stride, eps,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and head from the state before it and its deltas, normalised and gated."""
    i_h, i_block = tl.program_id(0), tl.program_id(1)
    i_s, i_first = block_of_run(p_starts, num_runs, i_block, BLOCK_T)
    if i_s >= 0:
        first = tl.load(p_starts + i_s)
        i_t, i_k, i_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        held = i_first + i_t < tl.load(p_starts + i_s + 1) - first
        i_row = (first + i_first).to(tl.int64)
        i_own = (i_block.to(tl.int64) * H + i_h) * BLOCK_T
        mask_v = held[:, None] & (i_v < V)[None, :]
        p_query = p_qk + (i_row * 2 * G + i_h // (H // G)) * K + (i_t[:, None] * 2 * G * K + i_k[None, :])
        b_q = tl.load(p_query, mask=held[:, None] & (i_k < K)[None, :], other=0.0)
        p_kept = p_before + (i_block.to(tl.int64) * H + i_h) * BLOCK_K * BLOCK_V
        b_kept = tl.load(p_kept + (i_v[:, None] * BLOCK_K + i_k[None, :]))
        b_log = tl.load(p_log + i_own + i_t)
        b_o = tl.exp(b_log)[:, None] * tl.dot(b_q, tl.trans(b_kept), input_precision=PRECISION)
        b_within = tl.load(p_within + i_own * BLOCK_T + (i_t[:, None] * BLOCK_T + i_t[None, :]))
        p_own_delta = p_delta + i_own * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :])
        b_d = tl.load(p_own_delta, mask=held[:, None], other=0.0)
        b_o += tl.dot(b_within, b_d, input_precision=PRECISION)
        C: tl.constexpr = 2 * G * K + H * V
        p_z = p_rows + i_row * row_stride + C + i_h * V + (i_t.to(tl.int64)[:, None] * row_stride + i_v[None, :])
        b_z = tl.load(p_z, mask=mask_v, other=0.0).to(tl.float32)
        b_out = gated_norm(b_o, b_z, tl.load(p_norm + i_v, mask=i_v < V, other=0.0), eps, V)
        p_own = p_out + (i_row * H + i_h) * V + (i_t[:, None] * H * V + i_v[None, :])
        tl.store(p_own, b_out.to(p_out.dtype.element_ty), mask=mask_v)


@triton.jit
def gated_delta_leaf_fwd_kernel(
    p_rows, p_conv, p_position, p_starts, p_lengths, p_sources, p_leaf_starts, p_leaf_positions, p_leaf_slots,
    num_runs, row_stride, C: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The conv inputs before a leaf's position, and the position."""
    i_leaf = tl.program_id(0)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_s = run_of_row(p_leaf_starts, num_runs, i_leaf, BLOCK_S)
    if i_s < num_runs:
        first = tl.load(p_starts + i_s)
        has_rows = tl.load(p_starts + i_s + 1) > first
        length = tl.load(p_lengths + i_s)
        source = tl.load(p_sources + i_s).to(tl.int64)
        position = tl.load(p_leaf_positions + i_leaf)
        slot = tl.load(p_leaf_slots + i_leaf).to(tl.int64)
        wanted = has_rows & (slot >= 0)
        for back in tl.static_range(1, W):
            at = position - back
            mask = wanted & (at >= 0) & (i_c < C)
            p_new = p_rows + (first + at - length).to(tl.int64) * row_stride + i_c
            b_in = tl.load(p_new, mask=mask & (at >= length), other=0.0).to(tl.float32)
            i_entry = (at + RING) % RING
            b_in += tl.load(p_conv + (source * RING + i_entry) * C + i_c, mask=mask & (at < length), other=0.0)
            tl.store(p_conv + (slot * RING + i_entry) * C + i_c, b_in, mask=mask)
        tl.store(p_position + slot, position, mask=wanted & (tl.program_id(1) == 0))


def gated_delta_prefill(
    rows_TP: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    starts_S1: Tensor,
    lengths_S: Tensor,
    sources_S: Tensor,
    leaves: Leaves,
    *,
    chip: Chip,
) -> Tensor:
    """See reference.py. Products run in tf32 for bf16 rows, in three tf32 products for fp32 rows."""
    assert rows_TP.stride(1) == 1
    dims, tiles, tokens, runs = DeltaDims.of(state), _SCAN[chip], rows_TP.shape[0], lengths_S.shape[0]
    groups, heads, key_dim, value_dim = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim
    precision = "tf32x3" if rows_TP.dtype is torch.float32 else "tf32"
    block_k, block_v = (max(triton.next_power_of_2(dim), 16) for dim in (key_dim, value_dim))
    shape = {"G": groups, "H": heads, "K": key_dim, "V": value_dim}
    ring = {"W": weights.conv_WC.shape[0], "RING": state.ring}

    def buffer(*size: int) -> Tensor:
        return torch.empty(size, device=rows_TP.device)

    chunks = tokens // _CHUNK + runs
    qk, v = buffer(tokens, 2 * groups, key_dim), buffer(tokens, heads, value_dim)
    w, (u, delta) = buffer(chunks * heads * _CHUNK, block_k), buffer(2, chunks * heads * _CHUNK, block_v)
    within, log = buffer(chunks * heads * _CHUNK, _CHUNK), buffer(chunks * heads * _CHUNK)
    turned, before = buffer(chunks * groups * block_k, _CHUNK), buffer(chunks * heads * block_v, block_k)
    out_TX = torch.empty((tokens, heads * value_dim), dtype=rows_TP.dtype, device=rows_TP.device)
    runs_at = (starts_S1, lengths_S, sources_S)
    left_at = (leaves.starts_S1, leaves.positions_L, leaves.slots_L)
    chunk = {"BLOCK_T": _CHUNK, "BLOCK_K": block_k, "PRECISION": precision}
    gated_delta_conv_fwd_kernel[(2 * groups + heads, tokens // _CONV_ROWS + runs)](
        rows_TP, weights.conv_WC, state.conv_SRC, *runs_at, qk, v, runs, rows_TP.stride(0),
        **shape, **ring, BLOCK_T=_CONV_ROWS, BLOCK_C=max(block_k, block_v),
    )  # fmt: skip
    gated_delta_chunk_fwd_kernel[(heads, chunks)](
        rows_TP, weights.rate_H, weights.dt_bias_H, qk, v, starts_S1, w, u, within, log, turned,
        runs, rows_TP.stride(0), **shape, **chunk, BLOCK_V=block_v, num_warps=8,
    )  # fmt: skip
    columns = min(tiles.block_v, block_v)
    described = (
        TensorDescriptor.from_tensor(turned, [block_k, _CHUNK]),
        TensorDescriptor.from_tensor(w, [_CHUNK, block_k]),
        TensorDescriptor.from_tensor(u, [_CHUNK, columns]),
    )
    gated_delta_scan_fwd_kernel[(block_v // columns, heads, runs)](
        *described, delta, log, before, state.state_SHKV, *runs_at, *left_at,
        **shape, **chunk, BLOCK_V=block_v, COLUMNS=columns, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    gated_delta_output_fwd_kernel[(heads, chunks)](
        rows_TP, weights.norm_V, qk, delta, within, log, before, starts_S1, out_TX,
        runs, rows_TP.stride(0), weights.eps, **shape, **chunk, BLOCK_V=block_v, num_warps=8,
    )  # fmt: skip
    channels = dims.conv_channels
    gated_delta_leaf_fwd_kernel[(leaves.slots_L.shape[0], triton.cdiv(channels, _COPY_CHANNELS))](
        rows_TP, state.conv_SRC, state.position_S, *runs_at, *left_at, runs, rows_TP.stride(0),
        C=channels, **ring, BLOCK_C=_COPY_CHANNELS, BLOCK_S=32,
    )  # fmt: skip
    return out_TX
