"""Choosing each token's experts.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return ``(expert_ids_TK int32, gates_TK fp32)``: the K likeliest experts, best first, equals by the lower id.

    Gates are softmax probabilities over all experts, rescaled to sum to 1 when ``normalise`` is set.
    """
    # of equal values topk returns any; a stable sort keeps them in the order of their ids
    _, order_TE = logits_TE.float().sort(dim=-1, descending=True, stable=True)
    ids_TK = order_TE[:, :num_chosen]
    gates_TK = torch.softmax(logits_TE.float(), dim=-1).gather(-1, ids_TK)
    if normalise:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return ids_TK.to(torch.int32), gates_TK
