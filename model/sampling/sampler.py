"""Chooses tokens from logits, and tells log-probabilities.

Shapes: S sequences, R rows of logits, V vocabulary, L rows whose log-probabilities are asked for, N alternatives told
per row.

Rules (see `logit_rules`) change the logits first; then a token is drawn (`kernels/sampling`), by noise that is a
function of (seed, position, token id) alone. A row's token is the same in any batch, topology or restart. Rows without
rules, noise or filters pay for none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.kernels.sampling.layout import Draw, Draws
from divisi.kernels.sampling.reference import choose_tokens, rank_tokens, row_sums
from divisi.model.sampling.logit_rules import RuleBatch, SequenceRules
from divisi.model.sampling.token_counts import History

ChooseTokens = Callable[[Tensor, Draws, NDArray[np.int64]], Tensor]
"""`kernels.sampling.reference.choose_tokens`, or another implementation of it."""
NO_TOKEN = -1
"""Stands for the token of a row whose rules leave none."""


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

    @property
    def draw(self) -> Draw:
        """How its rows are drawn from."""
        return Draw(self.seed, self.temperature, self.top_k, self.top_p, self.min_p)


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
        self.free_rows, self.ruled_rows = np.array(free, dtype=np.int64), np.array(ruled, dtype=np.int64)
        draws = [sequence.draw for sequence in sequences]
        self.free, self.ruled = (Draws([draws[owners[index]] for index in part]) for part in (free, ruled))
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

    def __init__(self, choose: ChooseTokens = choose_tokens) -> None:
        self._choose = choose

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
            token_ids_R = self._choose(logits_RV, batch.free, positions_R)
        else:
            token_ids_R = torch.empty(batch.size, dtype=torch.int64, device=device)
            if len(batch.free_rows):
                rows = torch.from_numpy(batch.free_rows).to(device)
                token_ids_R[rows] = self._choose(logits_RV[rows], batch.free, positions_R[batch.free_rows])
            rows = torch.from_numpy(batch.ruled_rows).to(device)
            positions = positions_R[batch.ruled_rows]
            changed_RV = logits_RV[rows]
            batch.rules.apply_(changed_RV, positions, masks, None if ahead_RA is None else ahead_RA[rows])
            chosen_R = self._choose(changed_RV, batch.ruled, positions)
            nothing_R = changed_RV.gather(-1, chosen_R[:, None])[:, 0] == -torch.inf
            token_ids_R[rows] = chosen_R.masked_fill_(nothing_R, NO_TOKEN)
        logprobs = None
        if batch.logprob_rows:
            rows_L = torch.tensor(batch.logprob_rows, device=device)
            chosen_L = token_ids_R[rows_L].clamp_(min=0)
            logprobs = token_logprobs(logits_RV[rows_L], chosen_L, batch.most_logprobs)
        return Sampled(token_ids_R, logprobs)

    def drawn(self, passes: list[list[int]], batch: SamplingBatch, positions: Sequence[int]) -> list[list[int]]:
        """The tokens of rows without rules that were drawn elsewhere, as this has them: at some positions, and in each
        further pass at those after them, for the first rows of the pass before it.
        """
        return passes


def token_logprobs(logits_LV: Tensor, token_ids_L: Tensor, num_top: int) -> Logprobs:
    """Log-softmax of fp32 logits at one token per row, and at the `num_top` best (the lowest id first among equals)."""
    top_ids_LN = rank_tokens(logits_LV, min(num_top, logits_LV.shape[-1]))
    best_L1 = logits_LV.amax(dim=-1, keepdim=True)
    normaliser_L1 = best_L1.double() + row_sums((logits_LV - best_L1).exp_()).log_()
    chosen_L1 = logits_LV.gather(-1, token_ids_L[:, None]) - normaliser_L1
    top_LN = logits_LV.gather(-1, top_ids_LN) - normaliser_L1
    return Logprobs(chosen_L1.squeeze(-1).float(), top_ids_LN, top_LN.float())
