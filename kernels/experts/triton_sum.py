"""The sum of a token's experts, in the tree over their leaves. Shapes: as in reference.py; L leaves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.mixture.layout import ExpertParts
from divisi.kernels.pass_memory import Memory


@triton.jit
def parts_of_row(
    p_parts, p_ids, p_gates, p_leaves, i_t, i_d, D: tl.constexpr, CHOICES: tl.constexpr, LEAVES: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sum of gate x part of row ``i_t`` (int64) at the BLOCK_D columns ``i_d``, fp32."""
    i_l = tl.arange(0, LEAVES)
    b_y = tl.zeros([BLOCK_D, LEAVES], tl.float32)
    for k in tl.static_range(CHOICES):
        expert = tl.load(p_ids + i_t * CHOICES + k)
        held = expert >= 0
        leaf = tl.load(p_leaves + expert, mask=held, other=0)
        gate = tl.load(p_gates + i_t * CHOICES + k)
        b_part = tl.load(p_parts + (i_t * CHOICES + k) * D + i_d, mask=held & (i_d < D), other=0.0).to(tl.float32)
        b_term = tl.where(held, gate, 0.0) * b_part
        b_y += tl.where(i_l[None, :] == leaf, b_term[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        b_left, b_right = tl.split(tl.reshape(b_y, [BLOCK_D, LEAVES >> (level + 1), 2]))
        b_y = b_left + b_right
    return tl.reshape(b_y, [BLOCK_D])


@triton.jit
def experts_sum_fwd_kernel(
    p_parts, p_ids, p_gates, p_leaves, p_y, D: tl.constexpr, CHOICES: tl.constexpr, LEAVES: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_y = parts_of_row(p_parts, p_ids, p_gates, p_leaves, i_t, i_d, D, CHOICES, LEAVES, LEVELS, BLOCK_D)
    tl.store(p_y + i_t * D + i_d, b_y, mask=i_d < D)


def sum_parts(parts: ExpertParts, memory: Memory) -> Tensor:
    """Return ``y_TD`` (fp32)."""
    (tokens, choices), width, leaves = parts.ids_TK.shape, parts.parts_PD.shape[1], parts.tree.size
    y_TD = memory.empty((tokens, width), torch.float32, parts.parts_PD.device)
    block_d = max(min(triton.next_power_of_2(width), 4096 // leaves), 16)  # 32 sums a thread
    experts_sum_fwd_kernel[(tokens, triton.cdiv(width, block_d))](
        parts.parts_PD, parts.ids_TK, parts.gates_TK, parts.tree.leaves_E, y_TD, D=width, CHOICES=choices,
        LEAVES=leaves, LEVELS=leaves.bit_length() - 1, BLOCK_D=block_d,
    )  # fmt: skip
    return y_TD
