"""The sum of a token's experts, in the tree over their leaves. Shapes: as in reference.py; L leaves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.mixture.layout import ExpertParts
from divisi.kernels.pass_memory import Memory

# Columns of a program, each with a sum that waits at every level. On an H100 227 us for 8,192 rows (2,048 of 8 warps:
# 254; 256 of 2 warps: 225), 10 us for 64
_COLUMNS, _WARPS = 512, 4
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _term(p_parts, p_gates, i_first, key, i_d, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """gate x part, zero where there is no such choice; rounded before it is added, whatever it is added to."""
    held = key < _NONE
    i_part = i_first + key % BLOCK_K
    b_part = tl.load(p_parts + i_part * D + i_d, mask=held & (i_d < D), other=0.0).to(tl.float32)
    b_zero = tl.zeros_like(b_part)
    return tl.fma(b_part, b_zero + tl.load(p_gates + i_part, mask=held, other=0.0), b_zero)


@triton.jit
def _climb(b_y, b_left, leaf, to, LEVEL: tl.constexpr, LEVELS: tl.constexpr):
    """From ``leaf``'s node at a level to its parent, unless ``to`` is below it too; a left child waits."""
    if LEVEL < LEVELS:  # noqa: SIM102 - decided while compiling, the other while running
        if (leaf >> LEVEL) != (to >> LEVEL):
            if (leaf >> (LEVEL + 1)) == (to >> (LEVEL + 1)):
                b_left = b_y
            elif ((leaf >> LEVEL) & 1) == 1:
                b_y = b_left + b_y
                b_left = tl.zeros_like(b_left)
    return b_y, b_left


@triton.jit
def parts_of_row(
    p_parts, p_ids, p_gates, p_leaves, i_t, i_d, D: tl.constexpr, CHOICES: tl.constexpr, BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of gate x part of row ``i_t`` (int64) at the BLOCK_D columns ``i_d``, fp32.

    Choices come in the order of their leaves. Of a node's subtrees the left one is summed first and waits, one at each
    level, so that a row takes as many additions as it has choices, not as the tree has leaves.
    """
    i_first = i_t * CHOICES
    i_k = tl.arange(0, BLOCK_K)
    b_id = tl.load(p_ids + i_first + i_k, mask=i_k < CHOICES, other=-1)
    b_leaf = tl.load(p_leaves + b_id, mask=b_id >= 0, other=0)
    b_key = tl.where(b_id >= 0, b_leaf * BLOCK_K + i_k, _NONE)
    b_y = tl.zeros([BLOCK_D], tl.float32)
    b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7, b_8 = b_y, b_y, b_y, b_y, b_y, b_y, b_y, b_y, b_y
    key = tl.min(b_key, 0)
    leaf = tl.where(key < _NONE, key // BLOCK_K, 0)
    b_next = _term(p_parts, p_gates, i_first, key, i_d, D, BLOCK_K)
    for k in tl.static_range(CHOICES + 1):
        b_term, to = b_next, tl.where(key < _NONE, key // BLOCK_K, leaf)
        if k == CHOICES:
            to = -1 - leaf  # in another tree
        if k + 1 < CHOICES:  # on its way while this one is added
            b_key = tl.where(b_key == key, _NONE, b_key)
            key = tl.min(b_key, 0)
            b_next = _term(p_parts, p_gates, i_first, key, i_d, D, BLOCK_K)
        if to != leaf:
            b_y, b_0 = _climb(b_y, b_0, leaf, to, 0, LEVELS)
            b_y, b_1 = _climb(b_y, b_1, leaf, to, 1, LEVELS)
            b_y, b_2 = _climb(b_y, b_2, leaf, to, 2, LEVELS)
            b_y, b_3 = _climb(b_y, b_3, leaf, to, 3, LEVELS)
            b_y, b_4 = _climb(b_y, b_4, leaf, to, 4, LEVELS)
            b_y, b_5 = _climb(b_y, b_5, leaf, to, 5, LEVELS)
            b_y, b_6 = _climb(b_y, b_6, leaf, to, 6, LEVELS)
            b_y, b_7 = _climb(b_y, b_7, leaf, to, 7, LEVELS)
            b_y, b_8 = _climb(b_y, b_8, leaf, to, 8, LEVELS)
            if k < CHOICES:
                b_y = b_term
        else:
            b_y += b_term
        leaf = to
    return b_y


@triton.jit
def experts_sum_fwd_kernel(
    p_parts, p_ids, p_gates, p_leaves, p_y, D: tl.constexpr, CHOICES: tl.constexpr, BLOCK_K: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_y = parts_of_row(p_parts, p_ids, p_gates, p_leaves, i_t, i_d, D, CHOICES, BLOCK_K, LEVELS, BLOCK_D)
    tl.store(p_y + i_t * D + i_d, b_y, mask=i_d < D)


def sum_parts(parts: ExpertParts, memory: Memory) -> Tensor:
    """Return ``y_TD`` (fp32)."""
    (tokens, choices), width = parts.ids_TK.shape, parts.parts_PD.shape[1]
    y_TD = memory.empty((tokens, width), torch.float32, parts.parts_PD.device)
    block_d = min(triton.next_power_of_2(width), _COLUMNS)
    experts_sum_fwd_kernel[(tokens, triton.cdiv(width, block_d))](
        parts.parts_PD, parts.ids_TK, parts.gates_TK, parts.tree.leaves_E, y_TD, D=width, CHOICES=choices,
        BLOCK_K=triton.next_power_of_2(choices), LEVELS=parts.tree.size.bit_length() - 1, BLOCK_D=block_d,
        num_warps=_WARPS,
    )  # fmt: skip
    return y_TD
