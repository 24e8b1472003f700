"""The kernels of the chunked gated delta rule; triton_prefill.py says how they follow each other, chunked.py the math.

Shapes: as in layout.py and chunked.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from divisi.kernels.gated_delta.triton_inputs import gated_norm, log_decay
from divisi.kernels.gpu.runs import block_of_run, run_of_row


@triton.jit
def operand(b_x, PRECISION: tl.constexpr):
    """Round to tf32's 10 bits where products take these: left alone, the matrix units cut the rest off."""
    if PRECISION == "tf32":
        b_x = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_x


@triton.jit(do_not_specialize=["num_runs"])
def gated_delta_conv_fwd_kernel(
    p_rows, p_taps, p_conv, p_starts, p_lengths, p_sources, p_qk, p_v, num_runs, row_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
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
            tl.store(p_qk + (i_row * 2 * G + i_head) * K + i_d[None, :], operand(b_x, PRECISION), mask=mask)


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
        b_rounded = operand(b_inverse, PRECISION)
        b_part = tl.dot(operand(tl.where(below, b_lower, 0.0), PRECISION), b_rounded, input_precision=PRECISION)
        b_inverse = b_inverse - tl.dot(b_rounded, operand(b_part, PRECISION), input_precision=PRECISION)
        size *= 2
    return b_inverse


@triton.jit(do_not_specialize=["num_runs"])
def gated_delta_chunk_fwd_kernel(
    p_rows, p_rate, p_dt_bias, p_qk, p_v, p_starts, p_w, p_u, p_log, p_turned, num_runs, row_stride,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: u and w with delta = u - w S, the sums of log decay, and k^T.

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
        p_gate = p_rows + i_row * row_stride + C + H * V + i_h + i_t.to(tl.int64) * row_stride
        b_beta = tl.where(held, tl.sigmoid(tl.load(p_gate, mask=held, other=0.0).to(tl.float32)), 0.0)
        b_a = tl.load(p_gate + H, mask=held, other=0.0)
        b_decay = log_decay(b_a, tl.load(p_dt_bias + i_h), tl.load(p_rate + i_h))
        b_log = tl.cumsum(tl.where(held, b_decay, 0.0), 0)
        tl.store(p_log + i_own + i_t, b_log)
        # by some columns: more of them at once would take registers that a third program on the multiprocessor can use
        PART_K: tl.constexpr = BLOCK_K if BLOCK_K < 64 else 64
        PART_V: tl.constexpr = BLOCK_V if BLOCK_V < 64 else 64
        p_keys = p_qk + (i_row * 2 * G + G + i_h // (H // G)) * K
        i_group = tl.program_id(1).to(tl.int64) * G + i_h // (H // G)
        b_lower = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for part in tl.static_range(BLOCK_K // PART_K):
            i_k = part * PART_K + tl.arange(0, PART_K)
            p_key = p_keys + (i_t[:, None] * 2 * G * K + i_k[None, :])
            b_k = tl.load(p_key, mask=held[:, None] & (i_k < K)[None, :], other=0.0)
            if i_h % (H // G) == 0:  # a tf32 operand must be contiguous along the summed axis
                tl.store(p_turned + i_group * BLOCK_K * BLOCK_T + (i_k[None, :] * BLOCK_T + i_t[:, None]), b_k)
            b_lower = tl.dot(b_k, tl.trans(b_k), b_lower, input_precision=PRECISION)
        # masked before the exponential: above the diagonal it would overflow
        strict = i_t[:, None] > i_t[None, :]
        b_lower *= b_beta[:, None] * tl.exp(tl.where(strict, b_log[:, None] - b_log[None, :], 0.0))
        b_inverse = unit_lower_inverse(tl.where(strict, b_lower, 0.0), i_t, BLOCK_T, INVERSE)
        b_inverse = operand(b_inverse, PRECISION)
        # turned: a first operand may come from registers, while a second one that is not contiguous along the summed
        # axis would go to shared memory element by element, 16 to a bank
        b_turned = tl.trans(b_inverse)
        for part in tl.range(0, BLOCK_K // PART_K, num_stages=1):
            i_k = part * PART_K + tl.arange(0, PART_K)
            p_key = p_keys + (i_t[:, None] * 2 * G * K + i_k[None, :])
            b_k = tl.load(p_key, mask=held[:, None] & (i_k < K)[None, :], other=0.0)
            b_k = operand(b_k * (b_beta * tl.exp(b_log))[:, None], PRECISION)
            b_w = operand(tl.dot(tl.trans(b_k), b_turned, input_precision=PRECISION), PRECISION)
            tl.store(p_w + i_own * BLOCK_K + (i_t[None, :] * BLOCK_K + i_k[:, None]), b_w)
        for part in tl.range(0, BLOCK_V // PART_V, num_stages=1):
            i_v = part * PART_V + tl.arange(0, PART_V)
            p_value = p_v + (i_row * H + i_h) * V + (i_t[:, None] * H * V + i_v[None, :])
            b_v = b_beta[:, None] * tl.load(p_value, mask=held[:, None] & (i_v < V)[None, :], other=0.0)
            b_v = operand(b_v, PRECISION)
            b_u = tl.dot(tl.trans(b_v), b_turned, input_precision=PRECISION)
            tl.store(p_u + i_own * BLOCK_V + (i_t[None, :] * BLOCK_V + i_v[:, None]), b_u)


@triton.jit
def gated_delta_scan_fwd_kernel(
    d_turned, d_w, d_u, p_delta, p_log, p_before, p_state, p_starts, p_sources,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One run and head, some value columns: the state before each chunk, and its rows' deltas.

    Tiles come through descriptors, since per-thread addresses of three tiles would spill. Rows past a run's end are
    zero in u and w.
    """
    i_column, i_h, i_s = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2)
    i_block = 0
    for i in range(i_s):
        i_block += tl.cdiv(tl.load(p_starts + i + 1) - tl.load(p_starts + i), BLOCK_T)
    chunks = tl.cdiv(tl.load(p_starts + i_s + 1) - tl.load(p_starts + i_s), BLOCK_T)
    source = tl.load(p_sources + i_s).to(tl.int64)
    i_t, i_k, i_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), i_column + tl.arange(0, COLUMNS)
    mask = (i_k < K)[:, None] & (i_v < V)[None, :] & (source >= 0)
    b_s = tl.load(p_state + (source * H + i_h) * K * V + (i_k[:, None] * V + i_v[None, :]), mask=mask, other=0.0)
    for i in tl.range(i_block, i_block + chunks, num_stages=STAGES):
        i_tile = i * H + i_h
        b_w = d_w.load([i_tile * BLOCK_T, 0])
        b_u = d_u.load([i_tile * BLOCK_T, i_column])
        b_key = d_turned.load([(i * G + i_h // (H // G)) * BLOCK_K, 0])
        i_own = i_tile.to(tl.int64) * BLOCK_T
        b_log = tl.load(p_log + i_own + i_t)
        last = tl.load(p_log + i_own + BLOCK_T - 1)
        p_kept = p_before + i_tile.to(tl.int64) * BLOCK_K * BLOCK_V
        b_rounded = operand(b_s, PRECISION)
        tl.store(p_kept + (i_v[None, :] * BLOCK_K + i_k[:, None]), b_rounded)
        b_d = b_u - tl.dot(b_w, b_rounded, input_precision=PRECISION)
        tl.store(p_delta + i_own * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :]), b_d)
        b_left = operand(b_d * tl.exp(last - b_log)[:, None], PRECISION)
        b_s = b_s * tl.exp(last) + tl.dot(b_key, b_left, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_runs"])
def gated_delta_output_fwd_kernel(
    p_rows, p_norm, p_qk, p_delta, p_log, p_before, p_starts, p_out, num_runs, row_stride, eps,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PART_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and head from the state before it and its deltas, normalised and gated."""
    i_h, i_block = tl.program_id(0), tl.program_id(1)
    i_s, i_first = block_of_run(p_starts, num_runs, i_block, BLOCK_T)
    if i_s >= 0:
        first = tl.load(p_starts + i_s)
        i_t, i_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V)
        held = i_first + i_t < tl.load(p_starts + i_s + 1) - first
        i_row = (first + i_first).to(tl.int64)
        i_own = (i_block.to(tl.int64) * H + i_h) * BLOCK_T
        mask_v = held[:, None] & (i_v < V)[None, :]
        p_query = p_qk + (i_row * 2 * G + i_h // (H // G)) * K + i_t[:, None] * 2 * G * K
        p_kept = p_before + (i_block.to(tl.int64) * H + i_h) * BLOCK_K * BLOCK_V + i_v[:, None] * BLOCK_K
        b_log = tl.load(p_log + i_own + i_t)
        b_o = tl.zeros([BLOCK_V, BLOCK_T], tl.float32)
        b_within = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for part in tl.static_range(BLOCK_K // PART_K):
            i_k = part * PART_K + tl.arange(0, PART_K)[None, :]
            mask_k = held[:, None] & (i_k < K)
            b_q = tl.load(p_query + i_k, mask=mask_k, other=0.0)
            b_o = tl.dot(tl.load(p_kept + i_k), tl.trans(b_q), b_o, input_precision=PRECISION)
            b_k = tl.load(p_query + G * K + i_k, mask=mask_k, other=0.0)
            b_within = tl.dot(b_q, tl.trans(b_k), b_within, input_precision=PRECISION)
        b_o = tl.exp(b_log)[None, :] * b_o
        lower = i_t[:, None] >= i_t[None, :]  # masked before the exponential: above the diagonal it would overflow
        b_within = tl.where(lower, tl.exp(tl.where(lower, b_log[:, None] - b_log[None, :], 0.0)), 0.0) * b_within
        p_own_delta = p_delta + i_own * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :])
        b_d = tl.load(p_own_delta, mask=held[:, None], other=0.0)
        # turned, as in the chunk kernel
        b_d, b_within = tl.trans(operand(b_d, PRECISION)), tl.trans(operand(b_within, PRECISION))
        b_o = tl.trans(b_o + tl.dot(b_d, b_within, input_precision=PRECISION))
        C: tl.constexpr = 2 * G * K + H * V
        p_z = p_rows + i_row * row_stride + C + i_h * V + (i_t.to(tl.int64)[:, None] * row_stride + i_v[None, :])
        b_z = tl.load(p_z, mask=mask_v, other=0.0).to(tl.float32)
        b_out = gated_norm(b_o, b_z, tl.load(p_norm + i_v, mask=i_v < V, other=0.0), eps, V)
        p_own = p_out + (i_row * H + i_h) * V + (i_t[:, None] * H * V + i_v[None, :])
        tl.store(p_own, b_out.to(p_out.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=["num_runs"])
def gated_delta_leaf_fwd_kernel(
    p_turned, p_delta, p_log, p_before, p_state, p_starts, p_lengths, p_leaf_starts, p_leaf_positions, p_leaf_slots,
    num_runs,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state left at a position: that before its chunk, and the deltas of the chunk's rows up to it."""
    i_v = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    i_h, i_leaf = tl.program_id(1), tl.program_id(2)
    i_s = run_of_row(p_leaf_starts, num_runs, i_leaf, BLOCK_S)
    slot = tl.load(p_leaf_slots + i_leaf).to(tl.int64)
    if (i_s < num_runs) & (slot >= 0):
        i_block = 0
        for i in range(i_s):
            i_block += tl.cdiv(tl.load(p_starts + i + 1) - tl.load(p_starts + i), BLOCK_T)
        rows = tl.load(p_leaf_positions + i_leaf) - tl.load(p_lengths + i_s)
        chunk = (rows - 1) // BLOCK_T
        limit = rows - chunk * BLOCK_T
        i_t, i_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
        i_tile = ((i_block + chunk) * H + i_h).to(tl.int64)
        b_log = tl.load(p_log + i_tile * BLOCK_T + i_t)
        last = tl.load(p_log + i_tile * BLOCK_T + limit - 1)
        b_d = tl.load(p_delta + i_tile * BLOCK_T * BLOCK_V + (i_t[:, None] * BLOCK_V + i_v[None, :]))
        # rows after it are masked before the exponential: their decay would be a growth
        b_left = tl.where(i_t < limit, tl.exp(tl.minimum(last - b_log, 0.0)), 0.0)[:, None] * b_d
        p_key = p_turned + ((i_block + chunk).to(tl.int64) * G + i_h // (H // G)) * BLOCK_K * BLOCK_T
        b_key = tl.load(p_key + (i_k[:, None] * BLOCK_T + i_t[None, :]))
        b_s = tl.load(p_before + i_tile * BLOCK_K * BLOCK_V + (i_v[None, :] * BLOCK_K + i_k[:, None]))
        b_s = b_s * tl.exp(last) + tl.dot(b_key, operand(b_left, PRECISION), input_precision=PRECISION)
        p_own = p_state + (slot * H + i_h) * K * V + (i_k[:, None] * V + i_v[None, :])
        tl.store(p_own, b_s, mask=(i_k < K)[:, None] & (i_v < V)[None, :])


@triton.jit(do_not_specialize=["num_runs"])
def gated_delta_history_fwd_kernel(
    p_rows, p_conv, p_position, p_starts, p_lengths, p_sources, p_leaf_starts, p_leaf_positions, p_leaf_slots,
    num_runs, row_stride, C: tl.constexpr, W: tl.constexpr, RING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The conv inputs before a leaf's position, and the position."""
    i_leaf = tl.program_id(0)
    i_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i_s = run_of_row(p_leaf_starts, num_runs, i_leaf, BLOCK_S)
    slot = tl.load(p_leaf_slots + i_leaf).to(tl.int64)
    if (i_s < num_runs) & (slot >= 0):
        first = tl.load(p_starts + i_s)
        length = tl.load(p_lengths + i_s)
        source = tl.load(p_sources + i_s).to(tl.int64)
        position = tl.load(p_leaf_positions + i_leaf)
        for back in tl.static_range(1, W):
            at = position - back
            mask = (at >= 0) & (i_c < C)
            p_new = p_rows + (first + at - length).to(tl.int64) * row_stride + i_c
            b_in = tl.load(p_new, mask=mask & (at >= length), other=0.0).to(tl.float32)
            i_entry = (at + RING) % RING
            b_in += tl.load(p_conv + (source * RING + i_entry) * C + i_c, mask=mask & (at < length), other=0.0)
            tl.store(p_conv + (slot * RING + i_entry) * C + i_c, b_in, mask=mask)
        tl.store(p_position + slot, position, mask=tl.program_id(1) == 0)
