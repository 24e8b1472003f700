"""Choosing each token's experts.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return ``(expert_ids_TK int32, gates_TK fp32)``: the K likeliest experts, best first.

    Gates are softmax probabilities over all experts, rescaled to sum to 1 when ``normalise`` is set.
    """
    gates_TK, ids_TK = torch.softmax(logits_TE.float(), dim=-1).topk(num_chosen, dim=-1)
    if normalise:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return ids_TK.to(torch.int32), gates_TK
