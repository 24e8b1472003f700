"""Gated grouped-query attention.

Shapes: B sequences, T tokens, D model width, Q query heads, J KV heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divisi.model.config import ModelConfig
from divisi.model.demo.network.norm import Norm, linear, silent

CosSin = tuple[Tensor, Tensor]

_BLOCK = 256
"""Queries that attend at a time."""


@dataclass(frozen=True, slots=True)
class Heads:
    """One pass's rows, heads first: q, k, v ``[B, Q, T, H]`` and the gate ``[B, T, Q * H]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor


class Attention(nn.Module):
    """Gated grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = linear(c.hidden_size, 2 * self.heads * self.dim)
        self.k_proj = linear(c.hidden_size, self.kv_heads * self.dim)
        self.v_proj = linear(c.hidden_size, self.kv_heads * self.dim)
        self.o_proj = silent(self.heads * self.dim, c.hidden_size)
        self.q_norm, self.k_norm = Norm(self.dim, c.rms_norm_eps), Norm(self.dim, c.rms_norm_eps)
        nn.init.constant_(self.q_norm.weight, 0.5)  # sharp enough to find one token among many
        nn.init.constant_(self.k_norm.weight, 0.5)

    def project(self, x_BTD: Tensor, cos_sin: CosSin) -> Heads:
        """Queries, keys, values and gate."""
        batch, tokens, _ = x_BTD.shape
        q, gate = self.q_proj(x_BTD).view(batch, tokens, self.heads, 2 * self.dim).chunk(2, dim=-1)
        k = self.k_proj(x_BTD).view(batch, tokens, self.kv_heads, self.dim)
        v = self.v_proj(x_BTD).view(batch, tokens, self.kv_heads, self.dim)
        q, k = _rotate(self.q_norm(q), cos_sin), _rotate(self.k_norm(k), cos_sin)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
        return Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), torch.sigmoid(gate.flatten(2)))

    def forward(self, x_BTD: Tensor, cos_sin: CosSin) -> Tensor:
        """Attend to everything before."""
        h = self.project(x_BTD, cos_sin)
        out = attend(h.q, h.k, h.v)
        return self.finish(out, h)

    def finish(self, out: Tensor, heads: Heads) -> Tensor:
        """Gate what was attended to, and project it back."""
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2) * heads.gate)
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention, ``[B, Q, T, H]``, by blocks of queries: on a CPU twice as fast as torch's own at 512."""
    tokens = q.shape[2]
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    q, outs = q * q.shape[-1] ** -0.5, []
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        later = torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu(start + 1)
        scores = q[:, :, start:end] @ k[:, :, :end].mT + later
        outs.append(scores.softmax(-1, dtype=q.dtype) @ v[:, :, :end])
    return torch.cat(outs, 2)


def attend_drafting(passes: list[Heads]) -> Tensor:
    """Attention of the last of some drafting passes: the first pass's keys up to its own, its successors' own only.

    Entry i of every pass belongs to the same draft, so a later pass sees one key of each pass after the first.
    """
    now, first = passes[-1], passes[0]
    scale = now.q.shape[-1] ** -0.5
    tokens = first.k.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = (now.q @ first.k.mT * scale).masked_fill(later, -torch.inf)
    own = [(now.q * other.k).sum(-1, keepdim=True) * scale for other in passes[1:]]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = weights[..., :tokens] @ first.v
    for index, other in enumerate(passes[1:]):
        out = out + weights[..., tokens + index, None] * other.v
    return out


def rotary_tables(config: ModelConfig, tokens: int) -> CosSin:
    """Cosines and sines of the first `tokens` positions, ``[T, 1, rotary / 2]``."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32)
    angles = torch.arange(tokens)[:, None] * (1.0 / config.rope_theta ** (steps / config.rotary_dim))
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def _rotate(x_BTHD: Tensor, cos_sin: CosSin) -> Tensor:
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second, rest = x_BTHD[..., :half], x_BTHD[..., half : 2 * half], x_BTHD[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
