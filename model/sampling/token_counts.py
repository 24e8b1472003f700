"""Which tokens each sequence's history holds and how often its answer does, kept up to date token by token.

Shapes: Q sequences, H distinct tokens of the one that has the most, with room to grow.

Rows are padded with their own first token. A copy of a token is counted as the token is, so that whatever is computed
from a token and its count is the same for every copy, and may be scattered back in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_ROOM = 256
"""Columns added at a time."""


class History(NamedTuple):
    """The tokens of one sequence so far: a prompt of `prompt` tokens, then the answer. `key` stands for their owner."""

    key: Hashable
    tokens: Sequence[int]
    prompt: int


class TokenCounts:
    """Distinct tokens of prompt and answer (`ids_QH`, int64) and their occurrences in the answer (`counts_QH`, fp32).

    Built from the histories; rows that `previous` has under the same key are taken from there, since counting a long
    history anew costs much more. So `previous` must have been told of every token since (see `add`).
    """

    def __init__(self, histories: Sequence[History], previous: TokenCounts | None, device: torch.device) -> None:
        entries = [(previous and previous._entry(history.key)) or _counted(history, device) for history in histories]
        self._sizes = [ids_H.numel() for ids_H, _ in entries]
        width = max(self._sizes, default=0) + _ROOM
        self.ids_QH = torch.empty((len(entries), width), dtype=torch.int64, device=device)
        self.counts_QH = torch.empty((len(entries), width), dtype=torch.float32, device=device)
        for row, (ids_H, counts_H) in enumerate(entries):
            for target_H, source_H in ((self.ids_QH[row], ids_H), (self.counts_QH[row], counts_H)):
                target_H[: len(source_H)] = source_H
                target_H[len(source_H) :] = source_H[0]
        self._rows = {history.key: row for row, history in enumerate(histories)}
        self._sizes_Q1 = torch.tensor(self._sizes, dtype=torch.int64, device=device)[:, None]
        self._added = 0

    def add(self, token_ids_Q: Tensor) -> None:
        """Count one more token of each row's answer; none where it is below 0."""
        if self.ids_QH.shape[1] == max(self._sizes) + self._added:
            self.ids_QH = torch.cat([self.ids_QH, self.ids_QH[:, :1].expand(-1, _ROOM)], dim=1)
            self.counts_QH = torch.cat([self.counts_QH, self.counts_QH[:, :1].expand(-1, _ROOM)], dim=1)
        self._added += 1
        ids_Q1 = token_ids_Q[:, None]
        same_QH = self.ids_QH == ids_Q1
        self.counts_QH += same_QH
        is_new_Q1 = ~same_QH.any(dim=1, keepdim=True) & (ids_Q1 >= 0)
        # A token that is not new overwrites padding with padding.
        for values_QH, new_Q1 in ((self.ids_QH, ids_Q1), (self.counts_QH, torch.ones_like(ids_Q1).float())):
            padding_Q1 = values_QH[:, :1]
            values_QH.scatter_(1, self._sizes_Q1, torch.where(is_new_Q1, new_Q1, padding_Q1))
        self._sizes_Q1 += is_new_Q1

    def _entry(self, key: Hashable) -> tuple[Tensor, Tensor] | None:
        row = self._rows.get(key)
        if row is None:
            return None
        size = int(self._sizes_Q1[row])
        return self.ids_QH[row, :size], self.counts_QH[row, :size]


def counted_ahead(ids_PH: Tensor, counts_PH: Tensor, ahead_PA: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's tokens and counts with A more tokens of its answer, as if they had been added; below 0: none."""
    for column_P1 in ahead_PA.split(1, dim=1):
        is_there_P1 = column_P1 >= 0
        ids_P1 = torch.where(is_there_P1, column_P1, ids_PH[:, :1])  # padding, as everywhere
        same_PH = ids_PH == ids_P1
        counts_PH = counts_PH + (same_PH & is_there_P1)
        known_P1 = torch.where(same_PH, counts_PH, 0.0).amax(dim=1, keepdim=True)
        count_P1 = torch.where(same_PH.any(dim=1, keepdim=True), known_P1, 1.0)
        ids_PH, counts_PH = torch.cat([ids_PH, ids_P1], dim=1), torch.cat([counts_PH, count_P1], dim=1)
    return ids_PH, counts_PH


def _counted(history: History, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = np.asarray(history.tokens, dtype=np.int64)
    ids, places = np.unique(tokens, return_inverse=True)
    counts = np.bincount(places[history.prompt :], minlength=len(ids)).astype(np.float32)
    return torch.from_numpy(ids).to(device), torch.from_numpy(counts).to(device)
