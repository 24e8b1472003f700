"""Chooses tokens from logits, and tells log-probabilities.

Shapes: R rows of logits, V vocabulary, C candidates of a row (best first), L rows whose log-probabilities are asked
for, N alternatives told per row.

The token of a row is the Gumbel-max of its filtered distribution: argmax over the tokens kept of logit / temperature
plus noise, where the noise is a function of (seed, position, token id) alone (see `noise`). Every operation here treats
a row by itself, with reductions whose order does not depend on the number of rows, so a row's token is the same in any
batch, topology or restart. Among equal logits the lowest id ranks first, everywhere.

Filters apply in the order that vLLM uses: temperature, then the `top_k` best, then the fewest of these, best first,
that reach `top_p` of their probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.model.noise import gumbel_noise, row_keys

_CANDIDATES = 1024
"""Tokens that are ranked before falling back to ranking the whole vocabulary. Fixed, as ranks must not vary."""
_SUM_BLOCK = 16384
"""Elements summed at once: below PyTorch's limit for splitting one sum over threads, which would change its order."""
_MAX_ID = 0x7FFF_FFFF
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row is sampled: see `cluster.request.Sampling`. `logprobs` None: not told; n: with the n best."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None = None


class SamplingBatch:
    """The sampling parameters of a step's rows, sorted by the work they need. Reusable while the rows stay the same."""

    def __init__(self, rows: Sequence[RowSampling]) -> None:
        temperature_R = np.array([row.temperature for row in rows], dtype=np.float32)
        top_k_R = np.array([row.top_k for row in rows], dtype=np.int64)
        top_p_R = np.array([row.top_p for row in rows], dtype=np.float64)
        filtered_R = (top_k_R > 0) | (top_p_R < 1)
        self.size = len(rows)
        self.seeds_R = np.array([row.seed & _SEED_MASK for row in rows], dtype=np.uint64)
        # A positive temperature that rounds to 0 in fp32 is greedy too.
        self.plain = _Stochastic.of(np.flatnonzero((temperature_R > 0) & ~filtered_R), temperature_R, top_k_R, top_p_R)
        self.filtered = _Stochastic.of(
            np.flatnonzero((temperature_R > 0) & filtered_R), temperature_R, top_k_R, top_p_R
        )
        self.any_greedy = bool((temperature_R <= 0).any())
        self.logprob_rows = [index for index, row in enumerate(rows) if row.logprobs is not None]
        self.most_logprobs = max((row.logprobs or 0 for row in rows), default=0)


@dataclass(frozen=True, slots=True)
class _Stochastic:
    """Rows that are sampled in the same way, and their parameters."""

    rows: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]

    @staticmethod
    def of(
        rows: NDArray[np.int64],
        temperature_R: NDArray[np.float32],
        top_k_R: NDArray[np.int64],
        top_p_R: NDArray[np.float64],
    ) -> _Stochastic | None:
        if rows.size == 0:
            return None
        return _Stochastic(rows, temperature_R[rows], top_k_R[rows], top_p_R[rows])


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of L rows: of one token each, fp32 [L], and of the N best, ids and fp32 [L, N]."""

    chosen_L: Tensor
    top_ids_LN: Tensor
    top_LN: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of each row, int64 [R], and the log-probabilities of the rows in `SamplingBatch.logprob_rows`."""

    token_ids_R: Tensor
    logprobs: Logprobs | None


class Sampler:
    """Chooses one token per row of logits."""

    def sample(self, logits_RV: Tensor, batch: SamplingBatch, positions_R: NDArray[np.int64]) -> Sampled:
        """Choose the tokens that stand at `positions_R` of their sequences. The logits (fp32) are left as they are."""
        assert logits_RV.shape[0] == batch.size == len(positions_R)
        if batch.any_greedy or batch.size == 0:
            token_ids_R = logits_RV.argmax(dim=-1)
        else:
            token_ids_R = torch.empty(batch.size, dtype=torch.int64, device=logits_RV.device)
        for group, choose in ((batch.plain, _choose_plain), (batch.filtered, _choose_filtered)):
            if group is not None:
                rows = torch.from_numpy(group.rows).to(logits_RV.device)
                keys = row_keys(batch.seeds_R[group.rows], positions_R[group.rows])
                scaled_RV = _scale(logits_RV if len(rows) == batch.size else logits_RV[rows], group.temperature)
                token_ids_R[rows] = choose(scaled_RV, torch.from_numpy(keys).to(logits_RV.device), group)
        logprobs = None
        if batch.logprob_rows:
            rows_L = torch.tensor(batch.logprob_rows, device=logits_RV.device)
            logprobs = token_logprobs(logits_RV[rows_L], token_ids_R[rows_L], batch.most_logprobs)
        return Sampled(token_ids_R, logprobs)


def token_logprobs(logits_LV: Tensor, token_ids_L: Tensor, num_top: int) -> Logprobs:
    """Log-softmax of fp32 logits at one token per row, and at the `num_top` best (the lowest id first among equals)."""
    top_ids_LN = _rank(logits_LV, min(num_top, logits_LV.shape[-1]))
    best_L1 = logits_LV.amax(dim=-1, keepdim=True)
    normaliser_L1 = best_L1.double() + _row_sums((logits_LV - best_L1).exp_()).log_()
    chosen_L1 = logits_LV.gather(-1, token_ids_L[:, None]) - normaliser_L1
    top_LN = logits_LV.gather(-1, top_ids_LN) - normaliser_L1
    return Logprobs(chosen_L1.squeeze(-1).float(), top_ids_LN, top_LN.float())


def _scale(logits_RV: Tensor, temperature_R: NDArray[np.float32]) -> Tensor:
    """Return (logit - best) / temperature: 0 for the best token however small the temperature, negative otherwise."""
    temperature_R1 = torch.from_numpy(temperature_R).to(logits_RV.device)[:, None]
    return (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperature_R1)


def _choose_plain(scaled_RV: Tensor, keys_R2: Tensor, group: _Stochastic) -> Tensor:
    """Gumbel-max over the whole vocabulary."""
    ids_V = torch.arange(scaled_RV.shape[-1], dtype=torch.int32, device=scaled_RV.device)
    return (gumbel_noise(keys_R2, ids_V).add_(scaled_RV)).argmax(dim=-1)


def _choose_filtered(scaled_RV: Tensor, keys_R2: Tensor, group: _Stochastic) -> Tensor:
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
    ids_RC = _rank(scaled_RV, num_candidates)
    scaled_RC = scaled_RV.gather(-1, ids_RC)
    rank_C = torch.arange(num_candidates, device=scaled_RV.device)
    in_top_k_RC = (rank_C < top_k_R1) | (top_k_R1 <= 0)
    mass_RC = scaled_RC.double().exp_() * in_top_k_RC
    reached_RC = mass_RC.cumsum(dim=-1)
    has_top_k_R1 = (top_k_R1 > 0) & (top_k_R1 <= num_candidates)
    total_R1 = torch.where(has_top_k_R1, reached_RC[:, -1:], _row_sums(scaled_RV.exp()))
    wanted_R1 = torch.where(top_p_R1 < 1, top_p_R1 * total_R1, torch.inf)
    # A token is kept while those before it have not reached top_p; the best one always is.
    keep_RC = in_top_k_RC & ((reached_RC - mass_RC < wanted_R1) | (rank_C == 0))
    score_RC = gumbel_noise(keys_R2, ids_RC.int()).add_(scaled_RC).masked_fill_(~keep_RC, -torch.inf)
    chosen_R1 = ids_RC.gather(-1, score_RC.argmax(dim=-1, keepdim=True))
    unlimited_R1 = (top_k_R1 <= 0) & (reached_RC[:, -1:] >= wanted_R1)
    enough_R1 = has_top_k_R1 | unlimited_R1 | (num_candidates == vocab)
    return chosen_R1.squeeze(-1), enough_R1.squeeze(-1)


def _rank(values_RV: Tensor, count: int) -> Tensor:
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


def _row_sums(values_RV: Tensor) -> Tensor:
    """Sum of each row in fp64, [R, 1], in an order that does not depend on the number of rows or threads."""
    sums = [block.sum(dim=-1, dtype=torch.float64) for block in torch.split(values_RV, _SUM_BLOCK, -1)]
    return torch.stack(sums, dim=-1).sum(dim=-1, keepdim=True)
