"""The gated delta rule over many tokens at once, as matrix products (WY form).

Source: Yang et al. 2024, "Parallelizing linear transformers with the delta rule", arXiv 2406.06484, with the decay of
arXiv 2412.06464. Within a chunk the deltas solve (I + L) delta = beta (v - decayed S^T k), L strictly lower triangular.

Shapes: T tokens, N tokens of a chunk, H value heads, G key heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunked_scan(
    q_TGK: Tensor, k_TGK: Tensor, v_THV: Tensor, beta_TH: Tensor, decay_TH: Tensor, state_HKV: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Return outputs [T, H, V] and the state after the last token; ``state_HKV`` is not changed. All fp32."""
    groups = v_THV.shape[1] // q_TGK.shape[1]
    q_HTK, k_HTK = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (q_TGK, k_TGK))
    v_HTV, beta_HT, decay_HT = v_THV.transpose(0, 1), beta_TH.T, decay_TH.T
    out_HTV = torch.empty_like(v_HTV)
    for start in range(0, v_THV.shape[0], chunk):
        part = slice(start, start + chunk)
        out_HTV[:, part], state_HKV = _one_chunk(
            q_HTK[:, part], k_HTK[:, part], v_HTV[:, part], beta_HT[:, part], decay_HT[:, part], state_HKV
        )
    return out_HTV.transpose(0, 1), state_HKV


def _one_chunk(
    q_HNK: Tensor, k_HNK: Tensor, v_HNV: Tensor, beta_HN: Tensor, decay_HN: Tensor, state_HKV: Tensor
) -> tuple[Tensor, Tensor]:
    tokens = q_HNK.shape[1]
    # log space: a factor may underflow to zero, a difference of logs does not
    log_HN = decay_HN.clamp_min(torch.finfo(torch.float32).tiny).log().cumsum(1)
    ratio_HNN = (log_HN[:, :, None] - log_HN[:, None, :]).tril().exp().tril()
    since_HN1 = log_HN.exp()[:, :, None]
    lower_HNN = (beta_HN[:, :, None] * ratio_HNN * (k_HNK @ k_HNK.mT)).tril(-1)
    wanted_HNV = beta_HN[:, :, None] * (v_HNV - since_HN1 * (k_HNK @ state_HKV))
    eye_NN = torch.eye(tokens, dtype=q_HNK.dtype, device=q_HNK.device)
    delta_HNV = torch.linalg.solve_triangular(lower_HNN + eye_NN, wanted_HNV, upper=False, unitriangular=True)
    out_HNV = since_HN1 * (q_HNK @ state_HKV) + (ratio_HNN * (q_HNK @ k_HNK.mT)) @ delta_HNV
    left_HN1 = (log_HN[:, -1:] - log_HN).exp()[:, :, None]
    return out_HNV, since_HN1[:, -1:] * state_HKV + (left_HN1 * k_HNK).mT @ delta_HNV
