"""Initial weights that already copy: what followed the same tokens before is likely to follow again.

Such induction heads (Olsson et al. 2022, arXiv 2209.11895) appear by themselves after many millions of tokens, more
than this model gets. Planted, they are a beginning that training turns into exact copying and lookup.

The residual stream is divided for it: 0 is constant, 1 to 79 hold the token, 80 to 111 a projection of the token
before, 112 to 127 one of the token before that. The first layer writes these two, the attention layers read all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.model.demo.network.attention import Attention
from divisi.model.demo.network.delta import DeltaNet
from divisi.model.demo.network.network import Layer, Mtp, Network

_TOKEN, _BEFORE, _TWO_BEFORE = slice(1, 80), slice(80, 112), slice(112, 128)
_ALWAYS = 0.9
_SCALE = 0.38
_FORGETS = 5.0
_MATCHED = 24
"""Channels of a head past the rotated ones, which are compared."""


@torch.no_grad()
def plant_induction(network: Network) -> None:
    """Overwrite the embedding and parts of the first and the attention layers. Raises ValueError for another shape."""
    c = network.config
    shape = (
        c.hidden_size,
        c.head_dim,
        c.rotary_dim,
        c.num_key_value_heads,
        c.linear_key_head_dim,
        c.linear_value_head_dim,
    )
    if shape != (128, 32, 8, 2, 32, 32):
        raise ValueError(f"shape: induction is laid out for the demo model's widths, not {shape}")
    embedding = network.model.embed_tokens.weight
    embedding[:, _TOKEN] = torch.randn(embedding[:, _TOKEN].shape) * _SCALE
    embedding[:, 80:] = 0.0
    embedding[:, 0] = _ALWAYS
    projection = torch.randn(32, 79) * 79**-0.5
    first = network.model.layers[0].linear_attn
    assert isinstance(first, DeltaNet)
    _write_tokens_before(first, projection)
    for index in c.full_layers:
        attention = network.model.layers[index].self_attn
        assert isinstance(attention, Attention)
        _look_back(attention, projection)
    _draft_alike(network.mtp, projection)


def _draft_alike(mtp: Mtp, projection: Tensor) -> None:
    """The MTP layer's input is laid out alike: its own token, and from h what may tell of the token before."""
    width = mtp.fc.weight.shape[0]
    mtp.fc.weight *= 0.3
    mtp.fc.weight[0, 0] = 0.3
    mtp.fc.weight[_TOKEN, _TOKEN] += 0.35 * torch.eye(79)
    mtp.fc.weight[_BEFORE, width + 1 : width + 80] += 0.35 * projection
    layer = mtp.layers[0]
    assert isinstance(layer, Layer)
    _look_back(layer.self_attn, projection)


def _write_tokens_before(delta: DeltaNet, projection: Tensor) -> None:
    """The first two value heads forget at once: each outputs its value, by its convolution an earlier token."""
    rows = delta.in_proj_qkvz.weight  # of the first key head: q, k, two heads of v, two of z, 32 each
    rows[:192] = 0.0
    rows[:64, 0] = 1.0
    rows[64:96, _TOKEN] = 0.3 * projection
    rows[96:112, _TOKEN] = 0.3 * projection[:16]
    rows[128:192, 0] = 0.5
    delta.in_proj_ba.weight[:4] = 0.0
    delta.in_proj_ba.weight[:2, 0] = 1.0
    delta.dt_bias[:2] = _FORGETS
    delta.A_log[:2] = 1.4
    taps = delta.conv1d.weight[:, 0]  # q of both key heads, k of both, then v
    for start in (0, 64):
        taps[start : start + 32] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    taps[128:160] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    taps[160:192] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    delta.out_proj.weight[_BEFORE, :32] = 0.3 * torch.eye(32)
    delta.out_proj.weight[_TWO_BEFORE, 32:48] = 0.3 * torch.eye(16)


def _look_back(attention: Attention, projection: Tensor) -> None:
    """KV head 0 finds what followed the same token, KV head 1 what followed the same two."""
    q = attention.q_proj.weight.view(4, 2, 32, 128)  # heads, query or gate
    k, v = attention.k_proj.weight.view(2, 32, 128), attention.v_proj.weight.view(2, 32, 128)
    q[:, 0], k[:], v[:] = 0.02 * torch.randn(4, 32, 128), 0.0, 0.0
    q[:, 1] *= 0.2
    half = _MATCHED // 2
    for head in range(4):
        q[head, 0, 8 : 8 + half, _TOKEN] += projection[:half]
        if head < 2:
            q[head, 0, 8 + half :, _TOKEN] += projection[half:_MATCHED]
        else:
            q[head, 0, 8 + half :, 80 : 80 + half] += torch.eye(half)
    k[0, 8:, 80 : 80 + _MATCHED] = torch.eye(_MATCHED)
    k[1, 8 : 8 + half, 80 : 80 + half] = torch.eye(half)
    k[1, 8 + half :, 112 : 112 + half] = torch.eye(half)
    v[0, :, 1:33], v[1, :, 33:65] = torch.eye(32), torch.eye(32)
    out = attention.o_proj.weight.view(128, 4, 32)
    for head in range(4):
        start = 1 if head < 2 else 33
        out[start : start + 32, head] = 0.4 * torch.eye(32)
