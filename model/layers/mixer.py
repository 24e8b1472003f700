"""Token mixers: gated attention over pages, gated DeltaNet over state slots.

Rows of decoding sequences come first. They go through one call, all prefilling rows through another.
Shapes: T rows, D model width, P projected row, X mixer output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool
from divisi.kernels.gated_delta.layout import DeltaState
from divisi.kernels.select import Kernels
from divisi.model.batch import StepBatch
from divisi.model.weights import AttentionWeights, DeltaNetWeights


def attention(
    kernels: Kernels,
    weights: AttentionWeights,
    pool: KvPool,
    num_heads: int,
    x_TD: Tensor,
    cos_sin_TR: Tensor,
    batch: StepBatch,
    first: int = 0,
) -> Tensor:
    """Write the step's keys and values to their pages and attend; return ``y_TD``.

    ``first`` is the first position that a sequence has keys and values of, for batches of decoding rows alone.
    """
    rows_TP = biased(kernels.linear(x_TD, weights.rows_PD), weights.rows_bias_P)
    q_TQD = kernels.attention_inputs(rows_TP, cos_sin_TR, weights.norm, pool, batch.kv_rows_T, num_heads)
    parts = []
    if batch.decode is not None:
        rows, decode = slice(0, batch.decode_rows), batch.decode
        parts.append(
            kernels.attention_decode(
                q_TQD[rows], rows_TP[rows], pool, decode.starts_S1, decode.lengths_S, decode.pages_SN, first
            )
        )
    if batch.prefill is not None:
        rows, prefill = slice(batch.decode_rows, None), batch.prefill
        parts.append(
            kernels.attention_prefill(
                q_TQD[rows], rows_TP[rows], pool, prefill.starts_S1, prefill.lengths_S, prefill.pages_SN
            )
        )
    return biased(kernels.linear(_joined(parts), weights.out_DX), weights.out_bias_D)


def delta_net(kernels: Kernels, weights: DeltaNetWeights, state: DeltaState, x_TD: Tensor, batch: StepBatch) -> Tensor:
    """Advance each sequence's recurrence by its rows; return ``y_TD``."""
    rows_TP = kernels.linear(x_TD, weights.rows_PD)
    parts = []
    if batch.decode is not None:
        decode = batch.decode
        parts.append(
            kernels.gated_delta_decode(
                rows_TP[: batch.decode_rows], weights.delta, state, decode.starts_S1, decode.lengths_S, decode.slots_S
            )
        )
    if batch.prefill is not None:
        rows, prefill = rows_TP[batch.decode_rows :], batch.prefill
        parts.append(
            kernels.gated_delta_prefill(
                rows, weights.delta, state, prefill.starts_S1, prefill.lengths_S, prefill.sources_S, prefill.leaves
            )
        )
    return kernels.linear(_joined(parts).to(x_TD.dtype), weights.out_DX)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def biased(x_TN: Tensor, bias_N: Tensor | None) -> Tensor:
    """A projection's output with its bias, if it has one, added in place."""
    return x_TN if bias_N is None else x_TN.add_(bias_N)
