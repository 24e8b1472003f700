"""Gated DeltaNet in its chunked form.

Shapes: B sequences, T tokens, D model width, H value heads, G key heads, K key dim, V value dim, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divisi.model.config import ModelConfig
from divisi.model.demo.network.norm import linear, silent

_CHUNK = 16
_CHUNK_LOG = 4
"""log2 of the chunk: products that invert its unit lower triangular matrix."""


class DeltaNorm(nn.Module):
    """RMS norm with a plain weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class DeltaNet(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464) in its chunked form."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.groups, self.heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.key_dim, self.value_dim, self.eps = c.linear_key_head_dim, c.linear_value_head_dim, c.rms_norm_eps
        keys, values = self.groups * self.key_dim, self.heads * self.value_dim
        self.in_proj_qkvz = linear(c.hidden_size, 2 * keys + 2 * values)
        self.in_proj_ba = linear(c.hidden_size, 2 * self.heads)
        width = 2 * keys + values
        self.conv1d = nn.Conv1d(width, width, c.linear_conv_kernel_dim, groups=width, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 4).log())
        self.dt_bias = nn.Parameter(torch.empty(self.heads).uniform_(-7.0, -3.5))
        self.norm = DeltaNorm(self.value_dim)
        self.out_proj = silent(values, c.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix each row from its beginning."""
        batch, tokens, _ = x_BTD.shape
        per = self.heads // self.groups
        rows = self.in_proj_qkvz(x_BTD).view(batch, tokens, self.groups, -1)
        q, k, v, z = rows.split([self.key_dim, self.key_dim, per * self.value_dim, per * self.value_dim], dim=-1)
        b, a = self.in_proj_ba(x_BTD).view(batch, tokens, self.groups, 2 * per).split(per, dim=-1)
        mixed = F.silu(self._conv(torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)))
        keys = self.groups * self.key_dim
        q, k, v = mixed.split([keys, keys, self.heads * self.value_dim], dim=-1)
        q, k = (_unit(x.view(batch, tokens, self.groups, self.key_dim)) for x in (q, k))
        q, k = (x.repeat_interleave(per, 2).transpose(1, 2) for x in (q * self.key_dim**-0.5, k))
        v = v.view(batch, tokens, self.heads, self.value_dim).transpose(1, 2)
        beta = b.flatten(2).sigmoid().transpose(1, 2)
        log_decay = (-self.A_log.exp() * F.softplus(a.flatten(2) + self.dt_bias)).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):  # it inverts matrices
            out = delta_rule(q.float(), k.float(), v.float(), beta.float(), log_decay.float()).transpose(1, 2)
        out = F.rms_norm(out, (self.value_dim,), self.norm.weight, self.eps) * F.silu(z.reshape(out.shape))
        mixed_back: Tensor = self.out_proj(out.flatten(2))
        return mixed_back

    def _conv(self, x_BTC: Tensor) -> Tensor:
        taps = self.conv1d.weight.shape[-1]
        padded = F.pad(x_BTC, (0, 0, taps - 1, 0))
        weight_CW = self.conv1d.weight[:, 0]
        tokens = x_BTC.shape[1]
        total = padded[:, :tokens] * weight_CW[:, 0]
        for tap in range(1, taps):
            total = total + padded[:, tap : tap + tokens] * weight_CW[:, tap]
        return total


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """Gated delta rule from a zero state: q, k [B, H, T, K], v [B, H, T, V], beta and log decay [B, H, T].

    Within a chunk the deltas solve (I + L) delta = beta (v - decayed S^T k); I + L is inverted by repeated squaring,
    (I - L)(I + L^2)(I + L^4)..., as L is nilpotent, in batched products that train fast.
    """
    tokens = q.shape[2]
    pad = -tokens % _CHUNK
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        beta, log_decay = (F.pad(x, (0, pad)) for x in (beta, log_decay))
    q, k, v = (x.unflatten(2, (-1, _CHUNK)) for x in (q, k, v))
    beta, log_decay = (x.unflatten(2, (-1, _CHUNK)) for x in (beta, log_decay))
    total = log_decay.cumsum(-1)
    ratio = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    since = total.exp()[..., None]
    lower = (beta[..., None] * ratio * (k @ k.mT)).tril(-1)
    eye = torch.eye(_CHUNK, dtype=q.dtype)
    inverse, power = eye - lower, lower @ lower
    for _ in range(_CHUNK_LOG - 1):
        inverse = inverse + inverse @ power
        power = power @ power
    values = inverse @ (beta[..., None] * v)
    keys = inverse @ (beta[..., None] * since * k)
    scores = ratio * (q @ k.mT)
    within = scores @ values
    q_since = q * since - scores @ keys
    left = (total[..., -1:] - total).exp()[..., None] * k
    step_KK = -(left.mT @ keys)
    step_KV = left.mT @ values
    turn_KK = since[..., -1:, :] * torch.eye(q.shape[-1], dtype=q.dtype) + step_KK
    out = within + q_since @ _states(turn_KK, step_KV)
    return out.flatten(2, 3)[:, :, :tokens]


def _states(turn_BHCKK: Tensor, step_BHCKV: Tensor) -> Tensor:
    """The state before each of C chunks, of which each turns it and adds a step."""
    turns, steps = turn_BHCKK.flatten(0, 1).unbind(1), step_BHCKV.flatten(0, 1).unbind(1)
    states = [torch.zeros_like(steps[0])]
    for turn, step in zip(turns[:-1], steps[:-1], strict=True):
        states.append(torch.baddbmm(step, turn, states[-1]))
    return torch.stack(states, 1).view_as(step_BHCKV)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
