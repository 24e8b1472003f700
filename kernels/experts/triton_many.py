"""The experts' products where each has many pairs: 64 pairs at a time are the first operand, weights the second.

A tile is up to three parts of 64 pairs, which share the weights that a program loads: what bounds these products is the
weights' way from the L2 cache, once per tile. Parts without pairs cost nothing. Shapes: as in triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tokens(p_x, p_order, i_pair, end, D: tl.constexpr, CHOICES: tl.constexpr):
    # the first token stands in for pairs past the end: what becomes of it is not stored
    return p_x + (tl.load(p_order + i_pair, mask=i_pair < end, other=0) // CHOICES).to(tl.int64)[:, None] * D


@triton.jit
def _store_inner(p_inner, b_gate, b_up, i_pair, end, i_r, I: tl.constexpr):  # noqa: E741
    p_own = p_inner + i_pair.to(tl.int64)[:, None] * I + i_r[None, :]
    b_inner = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_own, b_inner.to(p_inner.dtype.element_ty), mask=(i_pair < end)[:, None] & (i_r < I)[None, :])


@triton.jit
def _up(
    p_x, d_gate_up, p_inner, p_order, expert, first, end, CHOICES: tl.constexpr, D: tl.constexpr,
    I: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,  # noqa: E741
    PARTS: tl.constexpr,
):  # fmt: skip
    i_d, i_r = tl.arange(0, DEPTH), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_0 = first + tl.arange(0, PART)
    i_1, i_2 = i_0 + PART, i_0 + 2 * PART
    p_0 = _tokens(p_x, p_order, i_0, end, D, CHOICES)
    p_1 = _tokens(p_x, p_order, i_1, end, D, CHOICES)
    p_2 = _tokens(p_x, p_order, i_2, end, D, CHOICES)
    b_gate_0 = tl.zeros([PART, ROWS], tl.float32)
    b_up_0, b_gate_1, b_up_1, b_gate_2, b_up_2 = b_gate_0, b_gate_0, b_gate_0, b_gate_0, b_gate_0
    i_row = expert * 2 * I + tl.program_id(0) * ROWS
    for i in tl.range(0, D, DEPTH, num_stages=STAGES):
        b_w_gate = d_gate_up.load([i_row, i]).T
        b_w_up = d_gate_up.load([i_row + I, i]).T
        mask = (i + i_d < D)[None, :]
        b_x_0 = tl.load(p_0 + i + i_d[None, :], mask=mask, other=0.0)
        b_gate_0 = tl.dot(b_x_0, b_w_gate, b_gate_0)
        b_up_0 = tl.dot(b_x_0, b_w_up, b_up_0)
        if PARTS > 1:
            b_x_1 = tl.load(p_1 + i + i_d[None, :], mask=mask, other=0.0)
            b_gate_1 = tl.dot(b_x_1, b_w_gate, b_gate_1)
            b_up_1 = tl.dot(b_x_1, b_w_up, b_up_1)
        if PARTS > 2:
            b_x_2 = tl.load(p_2 + i + i_d[None, :], mask=mask, other=0.0)
            b_gate_2 = tl.dot(b_x_2, b_w_gate, b_gate_2)
            b_up_2 = tl.dot(b_x_2, b_w_up, b_up_2)
    _store_inner(p_inner, b_gate_0, b_up_0, i_0, end, i_r, I)
    if PARTS > 1:
        _store_inner(p_inner, b_gate_1, b_up_1, i_1, end, i_r, I)
    if PARTS > 2:
        _store_inner(p_inner, b_gate_2, b_up_2, i_2, end, i_r, I)


@triton.jit
def experts_up_many_fwd_kernel(
    p_x, d_gate_up, p_inner, p_order, p_tile_expert, p_tile_first, p_tile_end, CHOICES: tl.constexpr, D: tl.constexpr,
    I: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """silu(gate) * up of a tile's pairs, in their sorted order."""
    i_tile = tl.program_id(1)
    expert = tl.load(p_tile_expert + i_tile)
    if expert >= 0:
        first = tl.load(p_tile_first + i_tile)
        end = tl.minimum(tl.load(p_tile_end + i_tile), first + 3 * PART)
        if end - first > 2 * PART:
            _up(p_x, d_gate_up, p_inner, p_order, expert, first, end, CHOICES, D, I, ROWS, DEPTH, STAGES, PART, 3)
        elif end - first > PART:
            _up(p_x, d_gate_up, p_inner, p_order, expert, first, end, CHOICES, D, I, ROWS, DEPTH, STAGES, PART, 2)
        else:
            _up(p_x, d_gate_up, p_inner, p_order, expert, first, end, CHOICES, D, I, ROWS, DEPTH, STAGES, PART, 1)


@triton.jit
def _store_part(p_parts, b_out, p_order, i_pair, end, i_r, D: tl.constexpr):
    i_place = tl.load(p_order + i_pair, mask=i_pair < end, other=0).to(tl.int64)
    p_own = p_parts + i_place[:, None] * D + i_r[None, :]
    tl.store(p_own, b_out.to(p_parts.dtype.element_ty), mask=(i_pair < end)[:, None] & (i_r < D)[None, :])


@triton.jit
def _down(
    d_inner, d_down, p_parts, p_order, expert, first, end, D: tl.constexpr, I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    b_out_0 = tl.zeros([PART, ROWS], tl.float32)
    b_out_1, b_out_2 = b_out_0, b_out_0
    i_row = expert * D + tl.program_id(0) * ROWS
    for i in tl.range(0, I, DEPTH, num_stages=STAGES):
        b_w = d_down.load([i_row, i]).T
        b_out_0 = tl.dot(d_inner.load([first, i]), b_w, b_out_0)
        if PARTS > 1:
            b_out_1 = tl.dot(d_inner.load([first + PART, i]), b_w, b_out_1)
        if PARTS > 2:
            b_out_2 = tl.dot(d_inner.load([first + 2 * PART, i]), b_w, b_out_2)
    i_r, i_pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), first + tl.arange(0, PART)
    _store_part(p_parts, b_out_0, p_order, i_pair, end, i_r, D)
    if PARTS > 1:
        _store_part(p_parts, b_out_1, p_order, i_pair + PART, end, i_r, D)
    if PARTS > 2:
        _store_part(p_parts, b_out_2, p_order, i_pair + 2 * PART, end, i_r, D)


@triton.jit
def experts_down_many_fwd_kernel(
    d_inner, d_down, p_parts, p_order, p_tile_expert, p_tile_first, p_tile_end, D: tl.constexpr,
    I: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """The expert's output of a tile's pairs, each at its pair's own place."""
    i_tile = tl.program_id(1)
    expert = tl.load(p_tile_expert + i_tile)
    if expert >= 0:
        first = tl.load(p_tile_first + i_tile)
        end = tl.minimum(tl.load(p_tile_end + i_tile), first + 3 * PART)
        if end - first > 2 * PART:
            _down(d_inner, d_down, p_parts, p_order, expert, first, end, D, I, ROWS, DEPTH, STAGES, PART, 3)
        elif end - first > PART:
            _down(d_inner, d_down, p_parts, p_order, expert, first, end, D, I, ROWS, DEPTH, STAGES, PART, 2)
        else:
            _down(d_inner, d_down, p_parts, p_order, expert, first, end, D, I, ROWS, DEPTH, STAGES, PART, 1)
