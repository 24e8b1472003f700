"""Twice the attention heads, from trained weights and with the same outputs: training goes on from where it was.

The new heads are copies that look a little elsewhere and add nothing yet (after Net2Net, Chen et al. 2016,
arXiv 1511.05641). A copy already finds something; a head from nothing would take more tokens than a stage has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.model.demo.network import Network
from divisi.model.demo.network.attention import Attention

_ELSEWHERE = 0.5
"""Noise in a copy's queries, keys and values, as a share of their size."""


@torch.no_grad()
def widen(network: Network, seed: int) -> Network:
    """A network of twice the query and KV heads that says the same."""
    config, generator = network.config, torch.Generator().manual_seed(seed)
    heads = {
        "num_attention_heads": 2 * config.num_attention_heads,
        "num_key_value_heads": 2 * config.num_key_value_heads,
    }
    wide = Network(config.model_copy(update=heads))
    weights = network.state_dict()
    for prefix, module in network.named_modules():
        if isinstance(module, Attention):
            for part in ("q_proj", "k_proj", "v_proj"):
                name = f"{prefix}.{part}.weight"
                weights[name] = torch.cat([weights[name], _elsewhere(weights[name], generator)])
            name = f"{prefix}.o_proj.weight"
            weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], dim=1)
    wide.load_state_dict(weights)
    return wide


def _elsewhere(weight: Tensor, generator: torch.Generator) -> Tensor:
    size = weight.square().mean().sqrt()
    return weight + _ELSEWHERE * size * torch.randn(weight.shape, generator=generator)
