"""Routed experts as two grouped products over (token, choice) pairs sorted by expert; nothing waits for the host.

In the products here weights are the first operand, tokens the second: with 16 tokens a tile still fills the matrix
units of Hopper and Blackwell, which want 64 rows or more. Those of triton_many.py take over where an expert has many.
Shapes: as in reference.py; P pairs (T K), N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.experts.triton_many import experts_down_many_fwd_kernel, experts_up_many_fwd_kernel
from divisi.kernels.experts.triton_place import SortedPairs, sort_pairs
from divisi.kernels.experts.triton_sum import sum_parts
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.linear.layout import Matrix, plain_rows
from divisi.kernels.mixture.layout import ExpertParts
from divisi.kernels.pass_memory import Memory

_PART = 64  # pairs that triton_many.py takes at a time; three of these are a tile


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
# many, by the products of triton_many.py: 256 rows of weights against 192 pairs take 192 registers a thread for sums,
# and the L2 cache's bandwidth no longer binds: 936 + 560 us for 8,192 tokens beside 1,091 + 609 of the tiles above
_PARTS = {Chip.H100: _Tiles(3 * _PART, 128, 256, 64, 8, 3)}
# fp32 weights: exact products, for tests
_EXACT = _Tiles(16, 16, 16, 32, 4, 1)


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


def routed_experts(
    x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix, *,
    chip: Chip, memory: Memory,
) -> Tensor:  # fmt: skip
    """See reference.py. As there, the inner values and an expert's output are rounded to the weights' dtype."""
    parts = expert_parts(x_TD, local_ids_TK, gates_TK, tree, gate_up_EFD, down_EDI, chip=chip, memory=memory)
    return sum_parts(parts, memory)


def expert_parts(
    x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix, *,
    chip: Chip, memory: Memory,
) -> ExpertParts:  # fmt: skip
    """What `routed_experts` sums up."""
    up_EFD, out_EDI = plain_rows(gate_up_EFD), plain_rows(down_EDI)
    assert all(t.is_contiguous() for t in (x_TD, local_ids_TK, gates_TK, up_EFD, out_EDI))
    (tokens, choices), (experts, width, inner) = local_ids_TK.shape, out_EDI.shape
    dtype, device, pairs = out_EDI.dtype, x_TD.device, tokens * choices
    tiles = _tiles(pairs, out_EDI, chip)
    sorted_pairs = sort_pairs(local_ids_TK, experts, tiles.pairs, memory)
    inner_PI = memory.empty((pairs, inner), dtype, device)
    parts_PD = memory.empty((pairs, width), dtype, device)
    multiply = _multiply_many if tiles is _PARTS.get(chip) else _multiply
    multiply(x_TD, up_EFD, out_EDI, inner_PI, parts_PD, sorted_pairs, choices, tiles)
    return ExpertParts(parts_PD, local_ids_TK, gates_TK, tree)


def _multiply(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor, inner_PI: Tensor, parts_PD: Tensor, pairs: SortedPairs,
    choices: int, tiles: _Tiles,
) -> None:  # fmt: skip
    (_, inner), (_, width) = inner_PI.shape, parts_PD.shape
    shape: dict[str, int | str] = {"D": width, "I": inner, "PAIRS": tiles.pairs, "DEPTH": tiles.depth}
    shape |= {"STAGES": tiles.stages, "PRECISION": "ieee" if down_EDI.dtype is torch.float32 else "tf32"}
    shape |= {"num_warps": tiles.warps}
    experts_up_fwd_kernel[(triton.cdiv(inner, tiles.up_rows), pairs.count)](
        x_TD, gate_up_EFD, inner_PI, pairs.order_P, *pairs.tile_3N, CHOICES=choices, ROWS=tiles.up_rows, **shape
    )
    experts_down_fwd_kernel[(triton.cdiv(width, tiles.down_rows), pairs.count)](
        inner_PI, down_EDI, parts_PD, pairs.order_P, *pairs.tile_3N, ROWS=tiles.down_rows, **shape
    )


def _multiply_many(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor, inner_PI: Tensor, parts_PD: Tensor, pairs: SortedPairs,
    choices: int, tiles: _Tiles,
) -> None:  # fmt: skip
    (_, inner), (_, width) = inner_PI.shape, parts_PD.shape
    shape = {"D": width, "I": inner, "DEPTH": tiles.depth, "STAGES": tiles.stages, "PART": _PART}
    d_gate_up = TensorDescriptor.from_tensor(gate_up_EFD.flatten(0, 1), [tiles.up_rows, tiles.depth])
    experts_up_many_fwd_kernel[(triton.cdiv(inner, tiles.up_rows), pairs.count)](
        x_TD, d_gate_up, inner_PI, pairs.order_P, *pairs.tile_3N,
        CHOICES=choices, ROWS=tiles.up_rows, **shape, num_warps=tiles.warps,
    )  # fmt: skip
    d_inner = TensorDescriptor.from_tensor(inner_PI, [_PART, tiles.depth])
    d_down = TensorDescriptor.from_tensor(down_EDI.flatten(0, 1), [tiles.down_rows, tiles.depth])
    experts_down_many_fwd_kernel[(triton.cdiv(width, tiles.down_rows), pairs.count)](
        d_inner, d_down, parts_PD, pairs.order_P, *pairs.tile_3N,
        ROWS=tiles.down_rows, **shape, num_warps=tiles.warps,
    )  # fmt: skip


def _tiles(pairs: int, down_EDI: Tensor, chip: Chip) -> _Tiles:
    """A matter of speed only: any tiles give the sums of any tokens."""
    if down_EDI.dtype is torch.float32:
        return _EXACT
    experts, width, inner = down_EDI.shape
    each = triton.cdiv(pairs, experts)
    if each <= 64:
        return (_FEW if each <= 16 else _SOME)[chip]
    described = width % 8 == 0 and inner % 8 == 0  # a descriptor's rows are whole 16 bytes
    return _PARTS[chip] if described and chip in _PARTS else _MANY[chip]
