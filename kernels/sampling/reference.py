"""Draws a token from each row of logits.

Shapes: R rows of logits, V vocabulary, C candidates of a row (best first).

The token of a row is the Gumbel-max of its filtered distribution: argmax over the tokens kept of logit / temperature
plus noise, where the noise is a function of (seed, position, token id) alone (see `noise`). Filters apply in the order
that vLLM uses: temperature, then the tokens at least `min_p` times as likely as the likeliest, then the `top_k` best of
these, then the fewest of these, best first, that reach `top_p` of their probability. Every operation treats a row by
itself, with reductions whose order does not depend on the number of rows. Among equal logits the lowest id ranks first.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.kernels.sampling.layout import Draws, Group
from divisi.kernels.sampling.noise import gumbel_noise, row_keys

_CANDIDATES = 1024
"""Tokens that are ranked before falling back to ranking the whole vocabulary. Fixed, as ranks must not vary."""
_SUM_BLOCK = 16384
"""Elements summed at once: below PyTorch's limit for splitting one sum over threads, which would change its order."""
_CPU_NOISE = 1 << 18
"""Noise values made at once on a CPU, so that they stay in its cache from one operation to the next."""
_MAX_ID = 0x7FFF_FFFF


def choose_tokens(logits_RV: Tensor, draws: Draws, positions_R: NDArray[np.int64]) -> Tensor:
    """Return the tokens [R], int64, that stand at the positions; of a row without a finite logit, any."""
    num_rows = logits_RV.shape[0]
    if draws.any_greedy or num_rows == 0:
        token_ids_R = logits_RV.argmax(dim=-1)
    else:
        token_ids_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    at_once = max(1, _CPU_NOISE // logits_RV.shape[-1]) if logits_RV.device.type == "cpu" else num_rows
    for group, choose, size in ((draws.plain, _choose_plain, at_once), (draws.filtered, _choose_filtered, num_rows)):
        for block in group.blocks(size) if group is not None else ():
            rows = torch.from_numpy(block.rows).to(logits_RV.device)
            keys = row_keys(draws.seeds_R[block.rows], positions_R[block.rows])
            scaled_RV = _scale(logits_RV if len(rows) == num_rows else logits_RV[rows], block)
            token_ids_R[rows] = choose(scaled_RV, torch.from_numpy(keys).to(logits_RV.device), block)
    return token_ids_R


def _scale(logits_RV: Tensor, group: Group) -> Tensor:
    """(logit - best) / temperature: 0 for the best token however small the temperature; -inf for what min_p drops."""
    temperature_R1 = torch.from_numpy(group.temperature).to(logits_RV.device)[:, None]
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperature_R1)
    if group.log_min_p is not None:
        least_R1 = torch.from_numpy(group.log_min_p).to(logits_RV.device)[:, None]
        scaled_RV.masked_fill_(scaled_RV < least_R1, -torch.inf)
    return scaled_RV


def _choose_plain(scaled_RV: Tensor, keys_R2: Tensor, group: Group) -> Tensor:
    """Gumbel-max over the whole vocabulary."""
    ids_V = torch.arange(scaled_RV.shape[-1], dtype=torch.int32, device=scaled_RV.device)
    return (gumbel_noise(keys_R2, ids_V).add_(scaled_RV)).argmax(dim=-1)


def _choose_filtered(scaled_RV: Tensor, keys_R2: Tensor, group: Group) -> Tensor:
    """Gumbel-max over what the filters keep: among the first candidates where they suffice, else over all tokens."""
    vocab = scaled_RV.shape[-1]
    top_k_R1 = torch.from_numpy(group.top_k).to(scaled_RV.device)[:, None]
    top_p_R1 = torch.from_numpy(group.top_p).to(scaled_RV.device)[:, None]
    chosen_R, enough_R = _choose_among(scaled_RV, keys_R2, top_k_R1, top_p_R1, min(_CANDIDATES, vocab))
    short = (~enough_R).nonzero().squeeze(-1)
    if short.numel():
        chosen_R[short], _ = _choose_among(scaled_RV[short], keys_R2[short], top_k_R1[short], top_p_R1[short], vocab)
    return chosen_R


def _choose_among(
    scaled_RV: Tensor, keys_R2: Tensor, top_k_R1: Tensor, top_p_R1: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Choose among each row's best `num_candidates`; also tell whether these include all that its filters keep."""
    vocab = scaled_RV.shape[-1]
    ids_RC = rank_tokens(scaled_RV, num_candidates)
    scaled_RC = scaled_RV.gather(-1, ids_RC)
    rank_C = torch.arange(num_candidates, device=scaled_RV.device)
    in_top_k_RC = (rank_C < top_k_R1) | (top_k_R1 <= 0)
    mass_RC = scaled_RC.double().exp_() * in_top_k_RC
    reached_RC = mass_RC.cumsum(dim=-1)
    has_top_k_R1 = (top_k_R1 > 0) & (top_k_R1 <= num_candidates)
    total_R1 = torch.where(has_top_k_R1, reached_RC[:, -1:], row_sums(scaled_RV.exp()))
    wanted_R1 = torch.where(top_p_R1 < 1, top_p_R1 * total_R1, torch.inf)
    # A token is kept while those before it have not reached top_p; the best one always is.
    keep_RC = in_top_k_RC & ((reached_RC - mass_RC < wanted_R1) | (rank_C == 0))
    score_RC = gumbel_noise(keys_R2, ids_RC.int()).add_(scaled_RC).masked_fill_(~keep_RC, -torch.inf)
    chosen_R1 = ids_RC.gather(-1, score_RC.argmax(dim=-1, keepdim=True))
    unlimited_R1 = (top_k_R1 <= 0) & (reached_RC[:, -1:] >= wanted_R1)
    enough_R1 = has_top_k_R1 | unlimited_R1 | (num_candidates == vocab)
    return chosen_R1.squeeze(-1), enough_R1.squeeze(-1)


def rank_tokens(values_RV: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest values of each row (fp32), largest first, the lowest id first among equals: int64.

    `torch.topk` leaves the order of equals open, so it gets keys without equals: the value's bits, mapped to an
    integer of the same order, above the complement of the id.
    """
    if count == 0:
        return torch.empty((values_RV.shape[0], 0), dtype=torch.int64, device=values_RV.device)
    bits_RV = (values_RV + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits_RV ^= (bits_RV >> 31) & _MAX_ID
    complement_V = _MAX_ID - torch.arange(values_RV.shape[-1], dtype=torch.int64, device=values_RV.device)
    keys_RV = (bits_RV.long() << 32) | complement_V
    keys_RC = keys_RV.topk(count, dim=-1).values
    return _MAX_ID - (keys_RC & 0xFFFF_FFFF)


def row_sums(values_RV: Tensor) -> Tensor:
    """Sum of each row in fp64, [R, 1], in an order that does not depend on the number of rows or threads."""
    sums = [block.sum(dim=-1, dtype=torch.float64) for block in torch.split(values_RV, _SUM_BLOCK, -1)]
    return torch.stack(sums, dim=-1).sum(dim=-1, keepdim=True)
