"""Gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) over state slots with a replay ring.

Per value head, with decay g, write strength beta, state S [K, V]:
    delta_t = beta_t (v_t - g_t S^T k_t),   S <- g_t S + k_t delta_t^T,   o_t = S^T q_t

Shapes: see layout.py; T rows of the call, X = H * V.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from divisi.kernels.gated_delta.chunked import chunked_scan
from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights, Leaves, check_sources


def gated_delta_decode(
    rows_TP: Tensor, weights: DeltaWeights, state: DeltaState, starts_S1: Tensor, lengths_S: Tensor, slots_S: Tensor
) -> Tensor:
    """Replay what each slot lags behind, then run the new rows on a copy; return ``out_TX``.

    Sequence s owns rows ``starts[s]:starts[s+1]`` at positions from ``lengths[s]`` on. Afterwards its slot stands at
    ``lengths[s]`` and the ring holds the new rows, which a later step replays or overwrites. A slot without rows
    is left alone.
    """
    out_TX = rows_TP.new_empty((rows_TP.shape[0], state.delta_SRHV.shape[2] * state.delta_SRHV.shape[3]))
    busy_S = starts_S1.diff() > 0
    gated_delta_flush(state, slots_S[busy_S], lengths_S[busy_S])
    starts, lengths = starts_S1.tolist(), lengths_S.tolist()
    for index, slot in enumerate(slots_S.tolist()):
        start, end, length = starts[index], starts[index + 1], lengths[index]
        if start == end:
            continue
        conv_TC, z, beta, decay = _inputs(rows_TP[start:end], weights, state, slot, length)
        q, k, v = _heads(conv_TC, state)
        local_HKV = state.state_SHKV[slot].clone()
        raw_TC = rows_TP[start:end, : conv_TC.shape[1]]
        for i in range(end - start):
            entry = (length + i) % state.ring
            out, delta_HV = _advance(local_HKV, q[i], k[i], v[i], beta[i], decay[i])
            state.conv_SRC[slot, entry] = raw_TC[i]
            state.key_SRGK[slot, entry] = k[i]
            state.delta_SRHV[slot, entry] = delta_HV
            state.decay_SRH[slot, entry] = decay[i]
            out_TX[start + i] = _gated_norm(out, z[i], weights).flatten()
    return out_TX


def gated_delta_prefill(
    rows_TP: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    starts_S1: Tensor,
    lengths_S: Tensor,
    sources_S: Tensor,
    leaves: Leaves,
) -> Tensor:
    """Scan the runs' rows, each from its source's state, and leave states in other slots; return ``out_TX``.

    Run s owns rows ``starts[s]:starts[s+1]`` at positions from ``lengths[s]`` on. Its source stands at ``lengths[s]``,
    or is -1 where that is 0, and is only read: several runs may share one. A run without rows leaves nothing.
    """
    check_sources(state, lengths_S, sources_S, leaves)
    out_TX = rows_TP.new_empty((rows_TP.shape[0], state.delta_SRHV.shape[2] * state.delta_SRHV.shape[3]))
    starts, firsts = starts_S1.tolist(), leaves.starts_S1.tolist()
    left = list(zip(leaves.positions_L.tolist(), leaves.slots_L.tolist(), strict=True))
    for run, (length, source) in enumerate(zip(lengths_S.tolist(), sources_S.tolist(), strict=True)):
        rows, own = slice(starts[run], starts[run + 1]), left[firsts[run] : firsts[run + 1]]
        if own:
            _scan(rows_TP[rows], weights, state, length, source, own, out_TX[rows])
    return out_TX


def _scan(
    rows_TP: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    length: int,
    source: int,
    left: list[tuple[int, int]],
    out_TX: Tensor,
) -> None:
    """One run: from leave to leave, each a (position, slot)."""
    conv_TC, z, beta, decay = _inputs(rows_TP, weights, state, source, length)
    q, k, v = _heads(conv_TC, state)
    now_HKV = state.state_SHKV[source] if source >= 0 else torch.zeros_like(state.state_SHKV[0])
    before = weights.conv_WC.shape[0] - 1
    history_TC = torch.cat([_history(state, source, length, before + 1), rows_TP[:, : conv_TC.shape[1]]])
    start = 0
    for position, slot in left:
        part = slice(start, position - length)
        out_THV, now_HKV = chunked_scan(q[part], k[part], v[part], beta[part], decay[part], now_HKV)
        out_TX[part] = _gated_norm(out_THV, z[part], weights).flatten(1)
        state.state_SHKV[slot] = now_HKV
        state.position_S[slot] = position
        for back in range(1, min(before, position) + 1):
            state.conv_SRC[slot, (position - back) % state.ring] = history_TC[before + part.stop - back]
        start = part.stop


def gated_delta_flush(state: DeltaState, slots_N: Tensor, upto_N: Tensor) -> None:
    """Replay ring entries until each slot's state stands at position ``upto``; one that does already is left alone."""
    groups = state.delta_SRHV.shape[2] // state.key_SRGK.shape[2]
    position_N = state.position_S[slots_N]
    while (behind_N := position_N < upto_N).any():
        slots, entries = slots_N[behind_N], position_N[behind_N] % state.ring
        key_NHK = state.key_SRGK[slots, entries].repeat_interleave(groups, 1)
        change_NHKV = key_NHK[..., None] * state.delta_SRHV[slots, entries][:, :, None]
        state.state_SHKV[slots] = state.state_SHKV[slots] * state.decay_SRH[slots, entries, :, None, None] + change_NHKV
        position_N = position_N + behind_N
    state.position_S[slots_N] = position_N


def _advance(
    state_HKV: Tensor, q_GK: Tensor, k_GK: Tensor, v_HV: Tensor, beta_H: Tensor, decay_H: Tensor
) -> tuple[Tensor, Tensor]:
    """One token on ``state_HKV`` in place; return its output [H, V] and the delta [H, V] that it wrote."""
    groups = v_HV.shape[0] // q_GK.shape[0]
    q_HK, k_HK = q_GK.repeat_interleave(groups, 0), k_GK.repeat_interleave(groups, 0)
    state_HKV.mul_(decay_H[:, None, None])
    delta_HV = beta_H[:, None] * (v_HV - torch.einsum("hkv,hk->hv", state_HKV, k_HK))
    state_HKV += k_HK[:, :, None] * delta_HV[:, None, :]
    return torch.einsum("hkv,hk->hv", state_HKV, q_HK), delta_HV


def _inputs(
    rows_TP: Tensor, weights: DeltaWeights, state: DeltaState, slot: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split projected rows; return conv outputs [T, C], z [T, H, V], beta [T, H] and decay factors [T, H], fp32."""
    dims = DeltaDims.of(state)
    conv_TC, z_TX, b_TH, a_TH = rows_TP.float().split(dims.row_splits, dim=-1)
    taps = weights.conv_WC.shape[0]
    padded_TC = torch.cat([_history(state, slot, length, taps), conv_TC])
    mixed_TC = (padded_TC.unfold(0, taps, 1) * weights.conv_WC.T).sum(-1)
    decay_TH = (weights.rate_H * softplus(a_TH + weights.dt_bias_H)).exp()
    return silu(mixed_TC), z_TX.unflatten(1, (-1, dims.value_dim)), b_TH.sigmoid(), decay_TH


def _history(state: DeltaState, slot: int, length: int, taps: int) -> Tensor:
    """The ``taps - 1`` conv inputs before position ``length``, zero before the sequence's beginning."""
    history_TC = state.conv_SRC.new_zeros((taps - 1, state.conv_SRC.shape[2]), dtype=state.state_SHKV.dtype)
    for back in range(1, min(taps - 1, length) + 1):
        history_TC[-back] = state.conv_SRC[slot, (length - back) % state.ring]
    return history_TC


def _heads(conv_TC: Tensor, state: DeltaState) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [T, G, K], unit length, queries scaled by K^-1/2; values [T, H, V]."""
    dims = DeltaDims.of(state)
    width = dims.key_heads * dims.key_dim
    q, k, v = conv_TC.split([width, width, dims.value_heads * dims.value_dim], dim=-1)
    q, k = (x.unflatten(1, (dims.key_heads, dims.key_dim)) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return q * dims.key_dim**-0.5, k, v.unflatten(1, (dims.value_heads, dims.value_dim))


def _gated_norm(out: Tensor, z: Tensor, weights: DeltaWeights) -> Tensor:
    """RMS norm over the value dim, times silu(z)."""
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + weights.eps)
    return normed * weights.norm_V * silu(z)
