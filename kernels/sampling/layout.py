"""How rows of logits are drawn from, sorted by the work that they need; shared by all implementations.

Shapes: R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SEED_MASK = (1 << 64) - 1


class Draw(NamedTuple):
    """How one row is drawn from; a temperature that rounds to 0 in fp32 is greedy."""

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    min_p: float = 0.0


class Draws:
    """The parameters of some rows as arrays. Lives as long as the rows stay the same."""

    def __init__(self, rows: Sequence[Draw]) -> None:
        seeds, temperature, top_k, top_p, min_p = zip(*rows, strict=True) if rows else [()] * 5
        self.seeds_R = np.array([seed & _SEED_MASK for seed in seeds], dtype=np.uint64)
        self.temperature_R = np.array(temperature, dtype=np.float32)
        self.top_k_R = np.array(top_k, dtype=np.int64)
        self.top_p_R = np.array(top_p, dtype=np.float64)
        log_min_p = [math.log(least) if least > 0 else -math.inf for least in min_p]
        self.log_min_p_R = np.array(log_min_p, dtype=np.float32)
        arrays = self.seeds_R, self.temperature_R, self.top_k_R, self.top_p_R, self.log_min_p_R
        self.addresses = tuple([array.ctypes.data for array in arrays])
        """Of seeds, temperatures, top_k, top_p and log min_p."""

    @cached_property
    def plain(self) -> Group | None:
        """Rows that are drawn from all tokens."""
        return self._group(self._noisy & ~self._limited)

    @cached_property
    def filtered(self) -> Group | None:
        """Rows that are drawn from some of the most likely ones."""
        return self._group(self._noisy & self._limited)

    @property
    def any_greedy(self) -> bool:
        """Whether some row takes the most likely token."""
        return not bool(self._noisy.all())

    @property
    def _noisy(self) -> NDArray[np.bool_]:
        return self.temperature_R > 0

    @property
    def _limited(self) -> NDArray[np.bool_]:
        return (self.top_k_R > 0) | (self.top_p_R < 1)

    def __len__(self) -> int:
        return len(self.seeds_R)

    def _group(self, chosen_R: NDArray[np.bool_]) -> Group | None:
        rows = np.flatnonzero(chosen_R)
        if not len(rows):
            return None
        log_min_p = self.log_min_p_R[rows]
        return Group(
            rows,
            self.temperature_R[rows],
            self.top_k_R[rows],
            self.top_p_R[rows],
            log_min_p if log_min_p.max() > -math.inf else None,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are drawn from in the same way, and their parameters."""

    rows: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    log_min_p: NDArray[np.float32] | None

    def blocks(self, size: int) -> Iterator[Group]:
        """The group in blocks of so many rows."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            log_min_p = None if self.log_min_p is None else self.log_min_p[part]
            yield Group(self.rows[part], self.temperature[part], self.top_k[part], self.top_p[part], log_min_p)
