"""What every row goes through before and after the recurrence: causal conv and gates, gated norm. Jit functions only.

Shapes: as in layout.py; a projected row is ``[q GK | k GK | v HV | z HV | b H | a H]``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded_product(b_x, b_y):
    """``x * y`` for a sum to which each lane may bring a single product.

    Lanes exchange what they add. A plain product is contracted into the addition on the lane that made it and rounded
    on the others, so that each lane gets another sum, and rows decoded at once get other bits than one by one.
    """
    return tl.fma(b_x, b_y, tl.zeros_like(b_x))


@triton.jit
def causal_conv(
    p_rows, p_ring, p_taps, i_row, first, length, i_c, mask,
    row_stride, RING: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """SiLU of the causal filter at one row for the channels ``i_c``, fp32.

    ``i_row`` counts from the run's first row, which is row ``first`` of ``p_rows`` at position ``length``; all before
    comes from the slot's ring, and zero from before the sequence. All taps are one load: branches per tap cost 10
    times the load instructions.
    """
    i_w = tl.arange(0, BLOCK_W)[:, None]
    i_from = i_row - (W - 1) + i_w
    valid = mask[None, :] & (i_w < W)
    p_new = p_rows + (first + i_from).to(tl.int64) * row_stride + i_c[None, :]
    b_new = tl.load(p_new, mask=valid & (i_from >= 0), other=0.0).to(tl.float32)
    position = length + i_from
    p_old = p_ring + ((position + RING) % RING) * C + i_c[None, :]
    b_old = tl.load(p_old, mask=valid & (i_from < 0) & (position >= 0), other=0.0)
    b_tap = tl.load(p_taps + i_w * C + i_c[None, :], mask=valid, other=0.0)
    b_mixed = tl.sum(rounded_product(b_tap, b_new + b_old), 0)
    return b_mixed * tl.sigmoid(b_mixed)


@triton.jit
def log_decay(a, dt_bias, rate):
    """``rate * softplus(a + dt_bias)``, with a log1p that keeps the digits of small values."""
    x = a.to(tl.float32) + dt_bias
    e = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + e
    rest = one_more - 1.0
    log1p = tl.where(rest == 0.0, e, tl.log(one_more) * (e / tl.where(rest == 0.0, 1.0, rest)))
    return rate * tl.where(x > 20.0, x, log1p)


@triton.jit
def gated_norm(b_o, b_z, b_norm, eps, V: tl.constexpr):
    """RMS norm of rows of outputs over the value dim, times silu(z)."""
    return b_o * tl.rsqrt(tl.sum(b_o * b_o, 1)[:, None] / V + eps) * b_norm[None, :] * b_z * tl.sigmoid(b_z)


@triton.jit(do_not_specialize=["num_runs"])
def gated_norm_fwd_kernel(
    p_o, p_rows, p_norm, p_out, p_position, p_starts, p_lengths, p_slots, num_runs, row_stride, eps,
    H: tl.constexpr, V: tl.constexpr, Z: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Norm and gate a row's outputs; z begins at column Z of the projected row. Zero for rows that no sequence owns.

    Slots stand at their lengths afterwards. It is done here because programs of the decode kernel read the positions.
    """
    i_t = tl.program_id(0)
    i_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i_v = tl.arange(0, BLOCK_V)
    i_x = i_h * V + i_v[None, :]
    owned = i_t < tl.load(p_starts + num_runs)
    mask = (i_h < H) & (i_v < V)[None, :]
    b_o = tl.load(p_o + i_t.to(tl.int64) * H * V + i_x, mask=mask & owned, other=0.0)
    b_z = tl.load(p_rows + i_t.to(tl.int64) * row_stride + Z + i_x, mask=mask & owned, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + i_v, mask=i_v < V, other=0.0)
    b_out = gated_norm(b_o, b_z, b_norm, eps, V)
    tl.store(p_out + i_t.to(tl.int64) * H * V + i_x, b_out.to(p_out.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        for i_s in range(i_t, num_runs, tl.num_programs(0)):
            slot = tl.load(p_slots + i_s)
            has_rows = tl.load(p_starts + i_s + 1) > tl.load(p_starts + i_s)
            if (slot >= 0) & has_rows:
                tl.store(p_position + slot, tl.load(p_lengths + i_s))
