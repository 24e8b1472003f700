"""Routed SwiGLU experts.

Shapes: T tokens, K experts per token, D model width, I inner width, E experts held here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def routed_experts(
    x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor
) -> Tensor:
    """Return ``y_TD`` (fp32): per token the sum of gate x expert(x) over its experts held here.

    ``local_ids_TK`` (int32) index the weights' first axis; -1 marks an expert held elsewhere. ``gate_up_EFD`` has
    F = 2 I rows, the gate's first. The sum of a token runs in the order of its choices, whatever the other tokens do.
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
    return parts_TKD.sum(1)


def add_shared(routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor:
    """Return ``routed + sigmoid(logit) * shared`` in the dtype of ``shared``; ``logits_T`` may be strided."""
    return shared_TD * torch.sigmoid(logits_T)[:, None] + routed_TD.to(shared_TD.dtype)
