"""Routed SwiGLU experts.

Shapes: T tokens, K experts per token, D model width, I inner width, E experts held here, L leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from divisi.kernels.experts.layout import Tree

_ROWS = 256


def routed_experts(
    x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Tensor, down_EDI: Tensor
) -> Tensor:
    """Return ``y_TD`` (fp32): per token the sum of gate x expert(x) over its experts held here.

    ``local_ids_TK`` (int32) index the weights' first axis; -1 marks an expert held elsewhere. A leaf's terms are
    added in the order of the token's choices or of the experts, then leaf 0 to 1, 2 to 3 and so on, then these pairs,
    up to the root. ``gate_up_EFD`` has F = 2 I rows, the gate's first.
    """
    tokens, chosen = local_ids_TK.shape
    parts_TKD = x_TD.new_zeros((tokens, chosen, x_TD.shape[1]), dtype=torch.float32)
    x_cast_TD = x_TD.to(gate_up_EFD.dtype)
    for expert in torch.unique(local_ids_TK).tolist():
        if expert < 0:
            continue
        rows, choices = torch.where(local_ids_TK == expert)
        gate_TI, up_TI = (x_cast_TD[rows] @ gate_up_EFD[expert].T).chunk(2, dim=-1)
        out_TD = (silu(gate_TI) * up_TI) @ down_EDI[expert].T
        parts_TKD[rows, choices] = out_TD.float() * gates_TK[rows, choices, None]
    leaves_TK = tree.leaves_E[local_ids_TK.clamp(min=0)]
    slices = zip(parts_TKD.split(_ROWS), leaves_TK.split(_ROWS), strict=True)  # each leaf takes memory for its rows
    return torch.cat([sum_in_tree(*rows, tree.size) for rows in slices])


def sum_in_tree(parts_TKD: Tensor, leaves_TK: Tensor, size: int) -> Tensor:
    """Return ``y_TD``: per token the sum of its parts, each at its leaf of a binary tree with so many leaves."""
    tokens, chosen, width = parts_TKD.shape
    sums_TLD = parts_TKD.new_zeros(tokens, size, width)
    for choice in range(chosen):
        sums_TLD[torch.arange(tokens), leaves_TK[:, choice]] += parts_TKD[:, choice]
    while sums_TLD.shape[1] > 1:
        sums_TLD = sums_TLD[:, 0::2] + sums_TLD[:, 1::2]
    return sums_TLD[:, 0]


def add_shared(routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor:
    """Return ``routed + sigmoid(logit) * shared`` in the dtype of ``shared``; ``logits_T`` may be strided."""
    return shared_TD * torch.sigmoid(logits_T)[:, None] + routed_TD.to(shared_TD.dtype)
