"""Gated grouped-query attention over a paged KV pool.

A projected row is ``[q QD | gate QD | k JD | v JD]``. Shapes: T rows, S runs, N pages, others as in layout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.norm.reference import rms_norm

_QUERY_BLOCK = 256  # bounds the mask to 256 x context


def attention_inputs(
    rows_TP: Tensor, cos_sin_TR: Tensor, norm: QkNorm, pool: KvPool, kv_rows_T: Tensor, num_heads: int
) -> Tensor:
    """Normalise and rotate queries and keys, write keys and values to the pool; return ``q_TQD``.

    ``cos_sin_TR`` holds R/2 cosines, then R/2 sines, of each row's position. With no heads a row is ``[k JD | v JD]``.
    """
    kv_heads, dim = pool.key_PJD.shape[1:]
    widths = [num_heads * dim, num_heads * dim, kv_heads * dim, kv_heads * dim]
    q, _, k, v = (part.unflatten(-1, (part.shape[-1] // dim, dim)) for part in rows_TP.split(widths, dim=-1))
    q_TQD = _rotate(rms_norm(q, norm.query_D, norm.eps), cos_sin_TR)
    k_TJD = _rotate(rms_norm(k, norm.key_D, norm.eps), cos_sin_TR)
    pool.key_PJD[kv_rows_T.long()] = k_TJD.to(pool.key_PJD.dtype)
    pool.value_PJD[kv_rows_T.long()] = v.to(pool.value_PJD.dtype)
    return q_TQD


def attend_runs(
    q_TQD: Tensor,
    rows_TP: Tensor,
    pool: KvPool,
    starts_S1: Tensor,
    lengths_S: Tensor,
    pages_SN: Tensor,
    first: int = 0,
) -> Tensor:
    """Attend from each run's rows to its committed tokens and its rows up to their own; return gated [T, Q D].

    Run s owns rows ``starts[s]:starts[s+1]`` at positions from ``lengths[s]`` on; it may have none. This specifies both
    ``attention_decode`` and ``attention_prefill``, which differ in how many rows their runs have. ``first`` is the
    position, in every run, from which on there are keys and values; no row stands before it. Only decode takes one.
    """
    out_TX = torch.empty_like(q_TQD).flatten(1)
    starts = starts_S1.tolist()
    for run, length in enumerate(lengths_S.tolist()):
        rows = slice(starts[run], starts[run + 1])
        out_TX[rows] = _attend_run(q_TQD[rows], rows_TP[rows], pool, pages_SN[run], length, first)
    return out_TX


def _attend_run(q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, pages_N: Tensor, length: int, first: int) -> Tensor:
    tokens, heads, dim = q_TQD.shape
    total = length + tokens
    pages = pages_N[: -(-total // pool.page_size)].long()
    offsets = torch.arange(pool.page_size, device=pages.device)
    kv_rows = (pages[:, None] * pool.page_size + offsets).flatten()[:total]
    k_JSD, v_JSD = (x[kv_rows[first:]].to(q_TQD.dtype).transpose(0, 1) for x in (pool.key_PJD, pool.value_PJD))
    out_QTD = torch.empty((heads, tokens, dim), dtype=q_TQD.dtype, device=q_TQD.device)
    for start in range(0, tokens, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, tokens)
        visible = length + end - first
        # row i of the block sits at position length + start + i
        mask = torch.ones((end - start, visible), dtype=torch.bool, device=pages.device).tril(length + start - first)
        out_QTD[:, start:end] = scaled_dot_product_attention(
            q_TQD[start:end].transpose(0, 1)[None],
            k_JSD[None, :, :visible],
            v_JSD[None, :, :visible],
            attn_mask=mask,
            enable_gqa=True,
        )[0]
    gate_TX = rows_TP[:, heads * dim : 2 * heads * dim]
    return out_QTD.transpose(0, 1).flatten(1) * torch.sigmoid(gate_TX)


def _rotate(x_THD: Tensor, cos_sin_TR: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) on the first R dims, halves form."""
    cos, sin = cos_sin_TR[:, None, :].chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x_THD.dtype)
