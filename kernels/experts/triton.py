"""Routed experts as two grouped products over (token, choice) pairs sorted by expert; nothing waits for the host.

Weights are the first operand of each product, tokens the second: with 16 tokens a tile still fills the matrix units of
Hopper and Blackwell, which want 64 rows or more. Shapes: as in reference.py; P pairs (T K), M pairs of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.gpu.chip import Chip

_COUNT_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class _Tiles:
    pairs: int
    up_rows: int
    down_rows: int
    depth: int
    warps: int
    stages: int


# by pairs per expert, rounded up. Few: bound by the weights' bytes, so deep stages of long rows. Many: gate and up
# share a tile's tokens, 2 x 128 rows against 128. On an H100 weights through descriptors were no faster.
_FEW = {
    Chip.A100: _Tiles(16, 64, 128, 128, 4, 3),
    Chip.H100: _Tiles(16, 64, 128, 128, 4, 4),
    Chip.B200: _Tiles(16, 64, 128, 128, 4, 4),
}
_SOME = {
    Chip.A100: _Tiles(64, 64, 128, 64, 4, 3),
    Chip.H100: _Tiles(64, 64, 128, 64, 4, 3),
    Chip.B200: _Tiles(64, 64, 128, 64, 4, 4),
}
_MANY = {
    Chip.A100: _Tiles(128, 64, 128, 64, 8, 3),
    Chip.H100: _Tiles(128, 128, 128, 64, 8, 3),
    Chip.B200: _Tiles(128, 64, 128, 64, 8, 4),
}
# fp32 weights: exact products, for tests
_EXACT = _Tiles(16, 16, 16, 32, 4, 1)


@triton.jit
def experts_count_fwd_kernel(p_ids, p_counts, num_pairs, BLOCK: tl.constexpr):
    """How many pairs chose expert e."""
    i_e = tl.program_id(0)
    b_count = tl.zeros([BLOCK], tl.int32)
    for i in range(0, num_pairs, BLOCK):
        i_p = i + tl.arange(0, BLOCK)
        b_count += (tl.load(p_ids + i_p, mask=i_p < num_pairs, other=-1) == i_e).to(tl.int32)
    tl.store(p_counts + i_e, tl.sum(b_count, 0))


@triton.jit
def experts_place_fwd_kernel(
    p_ids, p_counts, p_order, p_tile_expert, p_tile_first, p_tile_end, num_pairs, num_tiles,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Expert e's pairs in their order, behind those of the experts before it, and its tiles."""
    i_e = tl.program_id(0)
    i_all = tl.arange(0, BLOCK_E)
    b_count = tl.load(p_counts + i_all, mask=i_all < E, other=0)
    b_tiles = tl.cdiv(b_count, PAIRS)
    first = tl.sum(tl.where(i_all < i_e, b_count, 0), 0)
    tile = tl.sum(tl.where(i_all < i_e, b_tiles, 0), 0)
    count = tl.load(p_counts + i_e)
    end = first + count
    for i in range(tl.cdiv(count, PAIRS)):
        tl.store(p_tile_expert + tile + i, i_e)
        tl.store(p_tile_first + tile + i, first + i * PAIRS)
        tl.store(p_tile_end + tile + i, end)
    if i_e == E - 1:  # ends the list
        for i in range(tile + tl.cdiv(count, PAIRS), num_tiles):
            tl.store(p_tile_expert + i, -1)
    if count > 0:
        for i in range(0, num_pairs, BLOCK):
            i_p = i + tl.arange(0, BLOCK)
            b_own = (tl.load(p_ids + i_p, mask=i_p < num_pairs, other=-1) == i_e).to(tl.int32)
            tl.store(p_order + first + tl.cumsum(b_own, 0) - 1, i_p, mask=b_own == 1)
            first += tl.sum(b_own, 0)


@triton.jit
def experts_up_fwd_kernel(
    p_x, p_gate_up, p_inner, p_order, p_tile_expert, p_tile_first, p_tile_end,
    CHOICES: tl.constexpr, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    PAIRS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a tile's pairs, in their sorted order."""
    i_tile = tl.program_id(1)
    expert = tl.load(p_tile_expert + i_tile).to(tl.int64)
    if expert >= 0:
        i_pair = tl.load(p_tile_first + i_tile) + tl.arange(0, PAIRS)
        held = i_pair < tl.load(p_tile_end + i_tile)
        i_token = (tl.load(p_order + i_pair, mask=held, other=0) // CHOICES).to(tl.int64)
        i_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        i_d = tl.arange(0, DEPTH)
        p_weight = p_gate_up + expert * 2 * I * D + i_r[:, None] * D + i_d[None, :]
        p_token = p_x + i_token[None, :] * D + i_d[:, None]
        b_gate = tl.zeros([ROWS, PAIRS], tl.float32)
        b_up = tl.zeros([ROWS, PAIRS], tl.float32)
        for i in tl.range(0, D, DEPTH, num_stages=STAGES):
            deep = i + i_d < D
            mask = (i_r < I)[:, None] & deep[None, :]
            b_x = tl.load(p_token + i, mask=held[None, :] & deep[:, None], other=0.0).to(p_gate_up.dtype.element_ty)
            b_gate = tl.dot(tl.load(p_weight + i, mask=mask, other=0.0), b_x, b_gate, input_precision=PRECISION)
            b_up = tl.dot(tl.load(p_weight + I * D + i, mask=mask, other=0.0), b_x, b_up, input_precision=PRECISION)
        b_inner = b_gate * tl.sigmoid(b_gate) * b_up
        p_out = p_inner + i_pair.to(tl.int64)[None, :] * I + i_r[:, None]
        tl.store(p_out, b_inner.to(p_inner.dtype.element_ty), mask=held[None, :] & (i_r < I)[:, None])


@triton.jit
def experts_down_fwd_kernel(
    p_inner, p_down, p_parts, p_order, p_tile_expert, p_tile_first, p_tile_end,
    D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    PAIRS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The expert's output of a tile's pairs, each at its pair's own place."""
    i_tile = tl.program_id(1)
    expert = tl.load(p_tile_expert + i_tile).to(tl.int64)
    if expert >= 0:
        i_pair = tl.load(p_tile_first + i_tile) + tl.arange(0, PAIRS)
        held = i_pair < tl.load(p_tile_end + i_tile)
        i_place = tl.load(p_order + i_pair, mask=held, other=0).to(tl.int64)
        i_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        i_i = tl.arange(0, DEPTH)
        p_weight = p_down + expert * D * I + i_r[:, None] * I + i_i[None, :]
        p_pair = p_inner + i_pair.to(tl.int64)[None, :] * I + i_i[:, None]
        b_out = tl.zeros([ROWS, PAIRS], tl.float32)
        for i in tl.range(0, I, DEPTH, num_stages=STAGES):
            deep = i + i_i < I
            b_w = tl.load(p_weight + i, mask=(i_r < D)[:, None] & deep[None, :], other=0.0)
            b_h = tl.load(p_pair + i, mask=held[None, :] & deep[:, None], other=0.0)
            b_out = tl.dot(b_w, b_h, b_out, input_precision=PRECISION)
        p_out = p_parts + i_place[None, :] * D + i_r[:, None]
        tl.store(p_out, b_out.to(p_parts.dtype.element_ty), mask=held[None, :] & (i_r < D)[:, None])


@triton.jit
def experts_sum_fwd_kernel(
    p_parts, p_ids, p_gates, p_y, D: tl.constexpr, CHOICES: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sum a token's parts in the order of its choices."""
    i_t = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_y = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(CHOICES):
        held = tl.load(p_ids + i_t * CHOICES + k) >= 0
        gate = tl.load(p_gates + i_t * CHOICES + k)
        b_part = tl.load(p_parts + (i_t * CHOICES + k) * D + i_d, mask=held & (i_d < D), other=0.0).to(tl.float32)
        b_y += tl.where(held, gate, 0.0) * b_part
    tl.store(p_y + i_t * D + i_d, b_y, mask=i_d < D)


def routed_experts(
    x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor, *, chip: Chip
) -> Tensor:
    """See reference.py. As there, the inner values and an expert's output are rounded to the weights' dtype."""
    assert all(t.is_contiguous() for t in (x_TD, local_ids_TK, gates_TK, gate_up_EFD, down_EDI))
    (tokens, choices), (experts, width, inner) = local_ids_TK.shape, down_EDI.shape
    dtype, device, pairs = down_EDI.dtype, x_TD.device, tokens * choices
    tiles = _tiles(pairs, experts, dtype, chip)
    # no more tiles than pairs, and at most one unfilled tile per expert
    num_tiles = min(pairs, pairs // tiles.pairs + experts)
    counts_E, order_P = torch.empty(experts, dtype=torch.int32, device=device), torch.empty_like(local_ids_TK)
    # rows of whole 16 bytes, or the pointers' alignment would make for more variants
    tile_3N = torch.empty((3, triton.cdiv(num_tiles, 4) * 4), dtype=torch.int32, device=device)
    inner_PI = torch.empty((pairs, inner), dtype=dtype, device=device)
    parts_PD = torch.empty((pairs, width), dtype=dtype, device=device)
    y_TD = torch.empty((tokens, width), device=device)
    experts_count_fwd_kernel[(experts,)](local_ids_TK, counts_E, pairs, BLOCK=_COUNT_BLOCK)
    experts_place_fwd_kernel[(experts,)](
        local_ids_TK, counts_E, order_P, *tile_3N, pairs, num_tiles,
        E=experts, BLOCK_E=triton.next_power_of_2(experts), BLOCK=_COUNT_BLOCK, PAIRS=tiles.pairs,
    )  # fmt: skip
    shape: dict[str, int | str] = {"D": width, "I": inner, "PAIRS": tiles.pairs, "DEPTH": tiles.depth}
    shape |= {"STAGES": tiles.stages, "PRECISION": "ieee" if dtype is torch.float32 else "tf32"}
    shape |= {"num_warps": tiles.warps}
    experts_up_fwd_kernel[(triton.cdiv(inner, tiles.up_rows), num_tiles)](
        x_TD, gate_up_EFD, inner_PI, order_P, *tile_3N, CHOICES=choices, ROWS=tiles.up_rows, **shape
    )
    experts_down_fwd_kernel[(triton.cdiv(width, tiles.down_rows), num_tiles)](
        inner_PI, down_EDI, parts_PD, order_P, *tile_3N, ROWS=tiles.down_rows, **shape
    )
    block_d = min(triton.next_power_of_2(width), 1024)
    experts_sum_fwd_kernel[(tokens, triton.cdiv(width, block_d))](
        parts_PD, local_ids_TK, gates_TK, y_TD, D=width, CHOICES=choices, BLOCK_D=block_d
    )
    return y_TD


def _tiles(pairs: int, experts: int, dtype: torch.dtype, chip: Chip) -> _Tiles:
    """A matter of speed only: any tiles give the sums of any tokens."""
    if dtype is torch.float32:
        return _EXACT
    each = triton.cdiv(pairs, experts)
    return (_FEW if each <= 16 else _SOME if each <= 64 else _MANY)[chip]
