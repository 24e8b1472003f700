"""Query and key norm, rotary embedding and the write to the pages, in one pass over the projected rows.

Unlike the reference it does not round between the norm and the rotation. Shapes: as in reference.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.pass_memory import Memory

_HEADS = 8  # a program's share of a row: 2,048 values at head dim 256, 16 a thread


@triton.jit
def attention_inputs_fwd_kernel(
    p_rows, p_cos_sin, p_query_scale, p_key_scale, p_kv_rows, p_q, p_key, p_value, row_stride, eps,
    Q: tl.constexpr, J: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    is_q, is_k = i_h < Q, (i_h >= Q) & (i_h < Q + J)
    i_kv = i_h - tl.where(i_h < Q + J, Q, Q + J)
    mask = (i_h < Q + 2 * J) & (i_d < D)
    i_pair = tl.where(i_d < HALF, i_d + HALF, tl.where(i_d < 2 * HALF, i_d - HALF, i_d))
    # a row is [q | gate | k | v]; keys and values lie behind the Q gates
    p_head = p_rows + i_t * row_stride + tl.where(is_q, i_h, i_h + Q) * D
    b_x = tl.load(p_head + i_d, mask=mask, other=0.0).to(tl.float32)
    b_pair = tl.load(p_head + i_pair, mask=mask, other=0.0).to(tl.float32)
    b_rms = tl.rsqrt(tl.sum(b_x * b_x, 1)[:, None] / D + eps)
    in_q, in_k = is_q & (i_d < D), is_k & (i_d < D)
    b_scale = tl.load(p_query_scale + i_d + i_h * 0, mask=in_q, other=0.0)
    b_scale += tl.load(p_key_scale + i_d + i_h * 0, mask=in_k, other=0.0)
    b_pair_scale = tl.load(p_query_scale + i_pair + i_h * 0, mask=in_q, other=0.0)
    b_pair_scale += tl.load(p_key_scale + i_pair + i_h * 0, mask=in_k, other=0.0)
    i_angle = tl.where(i_d < HALF, i_d, i_d - HALF)
    p_angle = p_cos_sin + i_t * 2 * HALF
    b_cos = tl.load(p_angle + i_angle, mask=i_d < 2 * HALF, other=1.0)
    b_sin = tl.load(p_angle + HALF + i_angle, mask=i_d < 2 * HALF, other=0.0)
    b_sin = tl.where(i_d < HALF, -b_sin, b_sin)
    b_turned = b_rms * (b_x * b_scale * b_cos + b_pair * b_pair_scale * b_sin)
    tl.store(p_q + (i_t * Q + i_h) * D + i_d, b_turned.to(p_q.dtype.element_ty), mask=mask & is_q)
    kv_row = tl.load(p_kv_rows + i_t).to(tl.int64)
    p_kv = (kv_row * J + i_kv) * D + i_d
    held = mask & (kv_row >= 0)
    tl.store(p_key + p_kv, b_turned.to(p_key.dtype.element_ty), mask=held & is_k)
    tl.store(p_value + p_kv, b_x.to(p_value.dtype.element_ty), mask=held & (i_h >= Q + J))


def attention_inputs(
    rows_TP: Tensor, cos_sin_TR: Tensor, norm: QkNorm, pool: KvPool, kv_rows_T: Tensor, num_heads: int,
    *, memory: Memory,
) -> Tensor:  # fmt: skip
    """See reference.py. A row whose ``kv_rows`` is negative is padding and writes nothing to the pool."""
    assert rows_TP.stride(1) == 1
    assert cos_sin_TR.is_contiguous()
    _, kv_heads, dim = pool.key_PJD.shape
    tokens = rows_TP.shape[0]
    q_TQD = memory.empty((tokens, num_heads, dim), rows_TP.dtype, rows_TP.device)
    grid = (tokens, triton.cdiv(num_heads + 2 * kv_heads, _HEADS))
    attention_inputs_fwd_kernel[grid](
        rows_TP, cos_sin_TR, norm.query_D, norm.key_D, kv_rows_T, q_TQD, pool.key_PJD, pool.value_PJD,
        rows_TP.stride(0), norm.eps, Q=num_heads, J=kv_heads, D=dim, HALF=cos_sin_TR.shape[1] // 2,
        BLOCK_H=_HEADS, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
    return q_TQD
