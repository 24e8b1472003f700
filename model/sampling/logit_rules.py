"""Rules that change a row's logits before its token is chosen: masks, biases, penalties.

Rules and histories belong to sequences, and rows refer to these.

Shapes: S sequences that have rules, R rows of theirs, V vocabulary, Q sequences and P rows with penalties, H distinct
tokens of a sequence, M rows with a mask, C bytes of a mask, F entries (row, token id) of a flat list, W bad words of
more than one token, T tokens before the last of the longest.

Applied in the order that vLLM uses: the grammar's mask, allowed token ids, bad words, the stop ids below `min_tokens`,
the biases, then the repetition, frequency and presence penalties. Each rule that some row has is one operation on all
its rows' entries; nothing in a step goes row by row in Python. Every result depends on its own row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from divisi.model.sampling.token_counts import History, TokenCounts, counted_ahead

_ANY = -1
"""Stands in a bad word's prefix where every token matches, since the prefix is shorter than the longest."""
_NONE = -2
"""Stands where the answer has no token yet."""


@dataclass(frozen=True, slots=True)
class SequenceRules:
    """The rules of one sequence: see `cluster.request.Sampling`.

    `stop_ids` are masked where the token to choose stands below `min_position`. `masked`: its rows get masks in each
    step. All token ids are in the vocabulary.
    """

    masked: bool = False
    allowed_token_ids: tuple[int, ...] | NDArray[np.int64] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_position: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether they change no logits."""
        return self.allowed_token_ids is None and self == SequenceRules()

    @property
    def has_penalty(self) -> bool:
        """Whether tokens seen before are treated otherwise than new ones."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class RuleBatch:
    """The rules of some rows as tensors. Lives as long as the rows stay the same; `add` tells it each new token."""

    def __init__(
        self,
        sequences: Sequence[SequenceRules],
        histories: Sequence[History],
        previous: RuleBatch | None,
        device: torch.device,
        owners: Sequence[int] | None = None,
    ) -> None:
        """`owners` tells the sequence of each row; without, each sequence has one row."""
        owners = range(len(sequences)) if owners is None else owners
        rules = [sequences[owner] for owner in owners]
        self._device = device
        self.masked_rows = [row for row, rule in enumerate(rules) if rule.masked]
        self._masked_rows_M = self._indices(self.masked_rows)
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        self._bans_of_byte = torch.from_numpy(np.where(bits, 0.0, -np.inf).astype(np.float32)).to(device)
        allowed = [(row, ids) for row, rule in enumerate(rules) if (ids := rule.allowed_token_ids) is not None]
        self._limited_rows = self._indices([row for row, _ in allowed])
        rows_F = np.repeat([row for row, _ in allowed], [len(ids) for _, ids in allowed]).astype(np.int64)
        ids_F = np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in allowed] or [rows_F])
        self._allowed_2F = torch.from_numpy(np.stack([rows_F, ids_F])).to(device)
        self._bad_words = _BadWords(sequences, histories, owners, device)
        stops = [(row, token) for row, rule in enumerate(rules) for token in rule.stop_ids if rule.min_position]
        self._stops_2F = self._pairs(stops)
        self._stop_rows_F = np.array([row for row, _ in stops], dtype=np.int64)
        self._min_positions_F = np.array([rules[row].min_position for row, _ in stops], dtype=np.int64)
        biases = [(row, token, bias) for row, rule in enumerate(rules) for token, bias in dict(rule.logit_bias).items()]
        self._biased_2F = self._pairs([(row, token) for row, token, _ in biases])
        self._biases_F = torch.tensor([bias for *_, bias in biases], dtype=torch.float32, device=device)
        self._penalties: _Penalties | None = None
        if any(rule.has_penalty for rule in sequences):
            known = previous._penalties if previous else None
            self._penalties = _Penalties(sequences, histories, owners, known, device)

    def apply_(
        self,
        logits_RV: Tensor,
        positions_R: NDArray[np.int64],
        masks: NDArray[np.int32] | None,
        ahead_RA: Tensor | None = None,
    ) -> None:
        """Change the logits in place, for tokens at `positions_R`.

        `masks`: int32 [M, ceil(V / 32)], the bits of the tokens allowed in each `masked` row, the lowest bit first.
        `ahead_RA`: see `Sampler.sample`.
        """
        if len(self._masked_rows_M):
            assert masks is not None, "rows with a mask get one in each step"
            assert len(masks) == len(self._masked_rows_M)
            masks_MC = torch.from_numpy(masks.view(np.uint8).astype(np.int64)).to(self._device)
            # Eight tokens at a time, from a table: masked_fill_ takes four times as long on a CPU.
            bans_MV = functional.embedding(masks_MC, self._bans_of_byte).flatten(1)[:, : logits_RV.shape[1]]
            logits_RV.index_add_(0, self._masked_rows_M, bans_MV)
        if len(self._limited_rows):
            rows_F, ids_F = self._allowed_2F
            kept_F = logits_RV[rows_F, ids_F]
            logits_RV.index_fill_(0, self._limited_rows, -torch.inf)
            logits_RV[rows_F, ids_F] = kept_F
        self._bad_words.ban_(logits_RV, ahead_RA)
        self._mask_early_stops_(logits_RV, positions_R)
        if len(self._biases_F):
            rows_F, ids_F = self._biased_2F
            logits_RV[rows_F, ids_F] += self._biases_F
        if self._penalties is not None:
            self._penalties.apply_(logits_RV, ahead_RA)

    def add(self, token_ids_S: Tensor) -> None:
        """Count the next token of each sequence, once it is committed; below 0 where there is none."""
        self._bad_words.add(token_ids_S)
        if self._penalties is not None:
            self._penalties.add(token_ids_S)

    def _mask_early_stops_(self, logits_RV: Tensor, positions_R: NDArray[np.int64]) -> None:
        if not len(self._min_positions_F):
            return
        early_F = positions_R[self._stop_rows_F] < self._min_positions_F
        if early_F.any():
            rows_F, ids_F = self._stops_2F[:, torch.from_numpy(early_F).to(self._device)]
            logits_RV[rows_F, ids_F] = -torch.inf

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _pairs(self, entries: Sequence[tuple[int, int]]) -> Tensor:
        """Entries (row, token id) as int64 [2, F]."""
        return torch.tensor(entries, dtype=torch.int64, device=self._device).reshape(-1, 2).T


class _BadWords:
    """Token sequences that must not appear in an answer."""

    def __init__(
        self,
        sequences: Sequence[SequenceRules],
        histories: Sequence[History],
        owners: Sequence[int],
        device: torch.device,
    ) -> None:
        words = [(row, word) for row, owner in enumerate(owners) for word in sequences[owner].bad_words]
        self._length = max((len(word) for _, word in words), default=1) - 1
        prefixes = [[_ANY] * (self._length + 1 - len(word)) + list(word[:-1]) for _, word in words]
        self._rows_W = torch.tensor([row for row, _ in words], dtype=torch.int64, device=device)
        self._owners_W = torch.tensor([owners[row] for row, _ in words], dtype=torch.int64, device=device)
        self._last_W = torch.tensor([word[-1] for _, word in words], dtype=torch.int64, device=device)
        shape = (len(words), self._length)
        self._prefixes_WT = torch.tensor(prefixes, dtype=torch.int64, device=device).reshape(shape)
        tails = [_tail(history, self._length) if words else [] for history in histories]
        self._tails_ST = torch.tensor(tails, dtype=torch.int64, device=device)

    def ban_(self, logits_RV: Tensor, ahead_RA: Tensor | None) -> None:
        if not len(self._rows_W):
            return
        tails_WT = self._tails_ST[self._owners_W]
        if ahead_RA is not None and self._length:
            ahead_WA = ahead_RA[self._rows_W]
            columns_T = torch.arange(self._length, device=ahead_WA.device)
            tails_WT = torch.cat([tails_WT, ahead_WA], 1).gather(1, (ahead_WA >= 0).sum(1)[:, None] + columns_T)
        matches_WT = (self._prefixes_WT == tails_WT) | (self._prefixes_WT == _ANY)
        ban_W = torch.zeros(len(self._rows_W), device=logits_RV.device)
        ban_W.masked_fill_(matches_WT.all(dim=1), -torch.inf)
        # Added, since several words of a row may end in the same token.
        logits_RV.index_put_((self._rows_W, self._last_W), ban_W, accumulate=True)

    def add(self, token_ids_S: Tensor) -> None:
        if self._length:
            token_ids_S1 = token_ids_S[:, None]
            moved_ST = torch.cat([self._tails_ST[:, 1:], token_ids_S1], dim=1)
            self._tails_ST = torch.where(token_ids_S1 >= 0, moved_ST, self._tails_ST)


class _Penalties:
    """What tokens seen before cost."""

    def __init__(
        self,
        sequences: Sequence[SequenceRules],
        histories: Sequence[History],
        owners: Sequence[int],
        previous: _Penalties | None,
        device: torch.device,
    ) -> None:
        penalised = [index for index, rules in enumerate(sequences) if rules.has_penalty]
        place = {owner: place for place, owner in enumerate(penalised)}
        rows = [(row, place[owner]) for row, owner in enumerate(owners) if owner in place]
        self._sequences_Q = torch.tensor(penalised, dtype=torch.int64, device=device)
        self._rows_P, self._places_P = torch.tensor(rows, dtype=torch.int64, device=device).T
        known: TokenCounts | None = previous._counts if previous else None
        self._counts: TokenCounts = TokenCounts([histories[index] for index in penalised], known, device)
        values = [
            (rule.repetition_penalty, rule.frequency_penalty, rule.presence_penalty)
            for rule in (sequences[owner] for owner in owners if owner in place)
        ]
        columns = torch.tensor(values, dtype=torch.float32, device=device).T[:, :, None]
        self._repetition_P1, self._frequency_P1, self._presence_P1 = columns

    def apply_(self, logits_RV: Tensor, ahead_RA: Tensor | None) -> None:
        ids_PH, counts_PH = self._counts.ids_QH, self._counts.counts_QH
        if len(self._places_P) != len(self._sequences_Q):
            ids_PH, counts_PH = ids_PH[self._places_P], counts_PH[self._places_P]
        if ahead_RA is not None:
            ids_PH, counts_PH = counted_ahead(ids_PH, counts_PH, ahead_RA[self._rows_P])
        logits_PH = logits_RV[self._rows_P[:, None], ids_PH]
        scale_PH = torch.where(logits_PH > 0, 1 / self._repetition_P1, self._repetition_P1)
        logits_PH = logits_PH * scale_PH - self._frequency_P1 * counts_PH - self._presence_P1 * (counts_PH > 0)
        logits_RV[self._rows_P[:, None], ids_PH] = logits_PH

    def add(self, token_ids_S: Tensor) -> None:
        self._counts.add(token_ids_S[self._sequences_Q])


def _tail(history: History, length: int) -> list[int]:
    """The last `length` tokens of the answer."""
    tail = list(history.tokens[max(history.prompt, len(history.tokens) - length) :]) if length else []
    return [_NONE] * (length - len(tail)) + tail
