"""Mixture of experts, all of them evaluated: at this size one product is faster than gathering.

Shapes: B sequences, T tokens, D model width, E experts, F gate and up of all experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divisi.model.config import ModelConfig
from divisi.model.demo.network.norm import linear, silent


@dataclass(slots=True)
class RouterLoad:
    """What the routers did in one forward pass, per layer of experts."""

    probability_LE: list[Tensor] = field(default_factory=list)
    """Mean softmax probability of each expert over the tokens that count."""
    share_LE: list[Tensor] = field(default_factory=list)
    """Share of the choices that fell on each expert."""

    def balance_loss(self) -> Tensor:
        """The load-balancing loss of Switch Transformers (arXiv 2101.03961), 1 when the load is even."""
        parts = [(p * s).sum() * p.numel() for p, s in zip(self.probability_LE, self.share_LE, strict=True)]
        return torch.stack(parts).mean()


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(width, inner), linear(width, inner), silent(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Feed forward."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Experts(nn.Module):
    """All routed experts, packed: in the checkpoint each has its own three matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, inner, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_DF = nn.Parameter(torch.randn(width, count * 2 * inner) * width**-0.5)
        self.down_FD = nn.Parameter(torch.zeros(count * inner, width))
        self.count, self.inner = count, inner

    def forward(self, x_BTD: Tensor, gates_BTE: Tensor) -> Tensor:
        """The sum of all experts, weighted by gates that are mostly zero."""
        gate, up = (x_BTD @ self.gate_up_DF).unflatten(-1, (self.count, 2, self.inner)).unbind(-2)
        down: Tensor = (F.silu(gate) * up * gates_BTE[..., None]).flatten(-2) @ self.down_FD
        return down


class Mixture(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen, self.count = config.num_experts_per_tok, config.num_experts
        self.gate = linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)
        self.shared_expert = Mlp(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = linear(config.hidden_size, 1)

    def forward(self, x_BTD: Tensor, load: RouterLoad, counts_BT: Tensor) -> Tensor:
        """Routed and shared experts; what the router did is added to `load`."""
        probability = self.gate(x_BTD).float().softmax(-1)
        gates, ids = probability.topk(self.chosen, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        gates_BTE = torch.zeros_like(probability).scatter(-1, ids, gates)
        weight = (counts_BT / counts_BT.sum())[..., None]
        load.probability_LE.append((probability * weight).sum((0, 1)))
        load.share_LE.append((((gates_BTE > 0).float() * weight).sum((0, 1)) / self.chosen).detach())
        shared = self.shared_expert(x_BTD) * torch.sigmoid(self.shared_expert_gate(x_BTD))
        whole: Tensor = self.experts(x_BTD, gates_BTE) + shared
        return whole
