"""Which tokens each row's history holds and how often its answer does, kept up to date token by token.

Shapes: P rows, H distinct tokens of the row that has the most, with room to grow.

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
    """The tokens of one row so far: a prompt of `prompt` tokens, then the answer. `key` stands for their owner."""

    key: Hashable
    tokens: Sequence[int]
    prompt: int


class TokenCounts:
    """Distinct tokens of prompt and answer (`ids_PH`, int64) and their occurrences in the answer (`counts_PH`, fp32).

    Built from the histories; rows that `previous` has under the same key are taken from there, since counting a long
    history anew costs much more. So `previous` must have been told of every token since (see `add`).
    """

    def __init__(self, histories: Sequence[History], previous: TokenCounts | None, device: torch.device) -> None:
        entries = [(previous and previous._entry(history.key)) or _counted(history, device) for history in histories]
        self._sizes = [ids_H.numel() for ids_H, _ in entries]
        width = max(self._sizes, default=0) + _ROOM
        self.ids_PH = torch.empty((len(entries), width), dtype=torch.int64, device=device)
        self.counts_PH = torch.empty((len(entries), width), dtype=torch.float32, device=device)
        for row, (ids_H, counts_H) in enumerate(entries):
            for target_H, source_H in ((self.ids_PH[row], ids_H), (self.counts_PH[row], counts_H)):
                target_H[: len(source_H)] = source_H
                target_H[len(source_H) :] = source_H[0]
        self._rows = {history.key: row for row, history in enumerate(histories)}
        self._sizes_P1 = torch.tensor(self._sizes, dtype=torch.int64, device=device)[:, None]
        self._added = 0

    def add(self, token_ids_P: Tensor) -> None:
        """Count one more token of each row's answer."""
        if self.ids_PH.shape[1] == max(self._sizes) + self._added:
            self.ids_PH = torch.cat([self.ids_PH, self.ids_PH[:, :1].expand(-1, _ROOM)], dim=1)
            self.counts_PH = torch.cat([self.counts_PH, self.counts_PH[:, :1].expand(-1, _ROOM)], dim=1)
        self._added += 1
        ids_P1 = token_ids_P[:, None]
        same_PH = self.ids_PH == ids_P1
        self.counts_PH += same_PH
        is_new_P1 = ~same_PH.any(dim=1, keepdim=True)
        # A token that is not new overwrites padding with padding.
        for values_PH, new_P1 in ((self.ids_PH, ids_P1), (self.counts_PH, torch.ones_like(ids_P1).float())):
            padding_P1 = values_PH[:, :1]
            values_PH.scatter_(1, self._sizes_P1, torch.where(is_new_P1, new_P1, padding_P1))
        self._sizes_P1 += is_new_P1

    def _entry(self, key: Hashable) -> tuple[Tensor, Tensor] | None:
        row = self._rows.get(key)
        if row is None:
            return None
        size = int(self._sizes_P1[row])
        return self.ids_PH[row, :size], self.counts_PH[row, :size]


def _counted(history: History, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = np.asarray(history.tokens, dtype=np.int64)
    ids, places = np.unique(tokens, return_inverse=True)
    counts = np.bincount(places[history.prompt :], minlength=len(ids)).astype(np.float32)
    return torch.from_numpy(ids).to(device), torch.from_numpy(counts).to(device)
