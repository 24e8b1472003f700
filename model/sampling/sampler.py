"""Chooses tokens from logits, and tells log-probabilities.

Shapes: S sequences, R rows of logits, V vocabulary, C candidates of a row (best first), L rows whose log-probabilities
are asked for, N alternatives told per row.

The token of a row is the Gumbel-max of its filtered distribution: argmax over the tokens kept of logit / temperature
plus noise, where the noise is a function of (seed, position, token id) alone (see `noise`). Every operation here treats
a row by itself, with reductions whose order does not depend on the number of rows, so a row's token is the same in any
batch, topology or restart. Among equal logits the lowest id ranks first, everywhere.

Rules (see `logit_rules`) change the logits first. Filters then apply in the order that vLLM uses: temperature, then
the tokens at least `min_p` times as likely as the likeliest, then the `top_k` best of these, then the fewest of these,
best first, that reach `top_p` of their probability. Rows without rules, noise or filters pay for none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.model.sampling.logit_rules import RuleBatch, SequenceRules
from divisi.model.sampling.noise import gumbel_noise, row_keys
from divisi.model.sampling.token_counts import History

NO_TOKEN = -1
"""Stands for the token of a row whose rules leave none."""
_CANDIDATES = 1024
"""Tokens that are ranked before falling back to ranking the whole vocabulary. Fixed, as ranks must not vary."""
_SUM_BLOCK = 16384
"""Elements summed at once: below PyTorch's limit for splitting one sum over threads, which would change its order."""
_CPU_NOISE = 1 << 18
"""Noise values made at once on a CPU, so that they stay in its cache from one operation to the next."""
_MAX_ID = 0x7FFF_FFFF
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SequenceSampling:
    """How the rows of one sequence are sampled: see `cluster.request.Sampling`.

    `logprobs` None: not told; n: with the n best.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int | None = None
    min_p: float = 0.0
    rules: SequenceRules | None = None
    history: History | None = None
    """The sequence's tokens so far; needed where there are rules."""


class SamplingBatch:
    """The sampling parameters of a step's sequences, and which row is whose, sorted by the work that the rows need.

    Reusable while both stay the same. It follows the sequences' histories where rules look at them: `add` must be told
    of every token that is committed. `previous` is the batch before this one; what it counted of sequences that go on
    is taken over.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceSampling],
        previous: SamplingBatch | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        owners: Sequence[int] | None = None,
    ) -> None:
        """`owners` tells the sequence of each row; without, each sequence has one row."""
        owners = range(len(sequences)) if owners is None else owners
        rows = [sequences[owner] for owner in owners]
        ruled = [index for index, row in enumerate(rows) if row.rules is not None]
        free = [index for index, row in enumerate(rows) if row.rules is None]
        self.size = len(rows)
        self.free = _Part(rows, free)
        self.ruled = _Part(rows, ruled)
        self.rules = None
        if ruled:
            place = {owner: place for place, owner in enumerate(sorted({owners[row] for row in ruled}))}
            self.rules = RuleBatch(
                [rule for owner in place if (rule := sequences[owner].rules) is not None],
                [sequences[owner].history or History(owner, (), 0) for owner in place],
                previous.rules if previous else None,
                device,
                [place[owners[row]] for row in ruled],
            )
            self._ruled_sequences = torch.tensor(list(place), dtype=torch.int64, device=device)
        self.masked_rows = [ruled[row] for row in self.rules.masked_rows] if self.rules else []
        """The rows for which each step brings a mask, ascending."""
        self.logprob_rows = [index for index, row in enumerate(rows) if row.logprobs is not None]
        self.most_logprobs = max((row.logprobs or 0 for row in rows), default=0)

    def add(self, token_ids_S: Tensor) -> None:
        """Take note of the sequences' next tokens, once they are committed; NO_TOKEN where there is none."""
        if self.rules is not None:
            self.rules.add(token_ids_S[self._ruled_sequences])


class _Part:
    """Some rows of a batch, sorted by how they are sampled. The groups' rows count within the part."""

    def __init__(self, batch_rows: Sequence[SequenceSampling], indices: Sequence[int]) -> None:
        rows = [batch_rows[index] for index in indices]
        self.rows = np.array(indices, dtype=np.int64)
        self.seeds_R = np.array([row.seed & _SEED_MASK for row in rows], dtype=np.uint64)
        # A positive temperature that rounds to 0 in fp32 is greedy too.
        noisy = [index for index, row in enumerate(rows) if np.float32(row.temperature) > 0]
        is_filtered = {index for index in noisy if rows[index].top_k > 0 or rows[index].top_p < 1}
        self.plain = _Stochastic.of(rows, [index for index in noisy if index not in is_filtered])
        self.filtered = _Stochastic.of(rows, sorted(is_filtered))
        self.any_greedy = len(noisy) < len(rows)


@dataclass(frozen=True, slots=True)
class _Stochastic:
    """Rows that are sampled in the same way, and their parameters."""

    rows: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    log_min_p: NDArray[np.float32] | None

    @staticmethod
    def of(part_rows: Sequence[SequenceSampling], indices: Sequence[int]) -> _Stochastic | None:
        if not indices:
            return None
        rows = [part_rows[index] for index in indices]
        log_min_p = [math.log(row.min_p) if row.min_p > 0 else -math.inf for row in rows]
        return _Stochastic(
            rows=np.array(indices, dtype=np.int64),
            temperature=np.array([row.temperature for row in rows], dtype=np.float32),
            top_k=np.array([row.top_k for row in rows], dtype=np.int64),
            top_p=np.array([row.top_p for row in rows], dtype=np.float64),
            log_min_p=np.array(log_min_p, dtype=np.float32) if max(log_min_p) > -math.inf else None,
        )

    def blocks(self, size: int) -> Iterator[_Stochastic]:
        """The group in blocks of so many rows."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            log_min_p = None if self.log_min_p is None else self.log_min_p[part]
            yield _Stochastic(self.rows[part], self.temperature[part], self.top_k[part], self.top_p[part], log_min_p)


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

    def sample(
        self,
        logits_RV: Tensor,
        batch: SamplingBatch,
        positions_R: NDArray[np.int64],
        masks: NDArray[np.int32] | None = None,
        ahead_RA: Tensor | None = None,
    ) -> Sampled:
        """Choose the tokens that stand at `positions_R` of their sequences. The logits (fp32) are left as they are.

        `masks`: see `RuleBatch.apply_`, for `batch.masked_rows`. `ahead_RA`: tokens before each row's that are not
        committed (int64), the earliest first, then NO_TOKEN; rules see them as history. A row of which the rules leave
        no token gets NO_TOKEN.
        Log-probabilities are of the logits as they came, before any rule.
        """
        assert logits_RV.shape[0] == batch.size == len(positions_R)
        device = logits_RV.device
        if batch.rules is None:
            token_ids_R = _choose(logits_RV, batch.free, positions_R)
        else:
            token_ids_R = torch.empty(batch.size, dtype=torch.int64, device=device)
            if len(batch.free.rows):
                rows = torch.from_numpy(batch.free.rows).to(device)
                token_ids_R[rows] = _choose(logits_RV[rows], batch.free, positions_R[batch.free.rows])
            rows = torch.from_numpy(batch.ruled.rows).to(device)
            positions = positions_R[batch.ruled.rows]
            changed_RV = logits_RV[rows]
            batch.rules.apply_(changed_RV, positions, masks, None if ahead_RA is None else ahead_RA[rows])
            chosen_R = _choose(changed_RV, batch.ruled, positions)
            nothing_R = changed_RV.gather(-1, chosen_R[:, None])[:, 0] == -torch.inf
            token_ids_R[rows] = chosen_R.masked_fill_(nothing_R, NO_TOKEN)
        logprobs = None
        if batch.logprob_rows:
            rows_L = torch.tensor(batch.logprob_rows, device=device)
            chosen_L = token_ids_R[rows_L].clamp_(min=0)
            logprobs = token_logprobs(logits_RV[rows_L], chosen_L, batch.most_logprobs)
        return Sampled(token_ids_R, logprobs)


def _choose(logits_RV: Tensor, part: _Part, positions_R: NDArray[np.int64]) -> Tensor:
    """The tokens [R] of a part's rows; of a row without a finite logit, any."""
    num_rows = logits_RV.shape[0]
    if part.any_greedy or num_rows == 0:
        token_ids_R = logits_RV.argmax(dim=-1)
    else:
        token_ids_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    at_once = max(1, _CPU_NOISE // logits_RV.shape[-1]) if logits_RV.device.type == "cpu" else num_rows
    for group, choose, size in ((part.plain, _choose_plain, at_once), (part.filtered, _choose_filtered, num_rows)):
        for block in group.blocks(size) if group is not None else ():
            rows = torch.from_numpy(block.rows).to(logits_RV.device)
            keys = row_keys(part.seeds_R[block.rows], positions_R[block.rows])
            scaled_RV = _scale(logits_RV if len(rows) == num_rows else logits_RV[rows], block)
            token_ids_R[rows] = choose(scaled_RV, torch.from_numpy(keys).to(logits_RV.device), block)
    return token_ids_R


def token_logprobs(logits_LV: Tensor, token_ids_L: Tensor, num_top: int) -> Logprobs:
    """Log-softmax of fp32 logits at one token per row, and at the `num_top` best (the lowest id first among equals)."""
    top_ids_LN = _rank(logits_LV, min(num_top, logits_LV.shape[-1]))
    best_L1 = logits_LV.amax(dim=-1, keepdim=True)
    normaliser_L1 = best_L1.double() + _row_sums((logits_LV - best_L1).exp_()).log_()
    chosen_L1 = logits_LV.gather(-1, token_ids_L[:, None]) - normaliser_L1
    top_LN = logits_LV.gather(-1, top_ids_LN) - normaliser_L1
    return Logprobs(chosen_L1.squeeze(-1).float(), top_ids_LN, top_LN.float())


def _scale(logits_RV: Tensor, group: _Stochastic) -> Tensor:
    """(logit - best) / temperature: 0 for the best token however small the temperature; -inf for what min_p drops."""
    temperature_R1 = torch.from_numpy(group.temperature).to(logits_RV.device)[:, None]
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)).div_(temperature_R1)
    if group.log_min_p is not None:
        least_R1 = torch.from_numpy(group.log_min_p).to(logits_RV.device)[:, None]
        scaled_RV.masked_fill_(scaled_RV < least_R1, -torch.inf)
    return scaled_RV


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
