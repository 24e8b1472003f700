"""Memory and small weights of one gated full-attention layer, shared by all implementations.

Shapes: P flat KV rows (pages x page size), J KV heads, Q query heads, D head dim, R rotary dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvPool:
    """One layer's paged keys and values. Page p holds rows ``p * page_size`` to ``(p + 1) * page_size``."""

    key_PJD: Tensor
    value_PJD: Tensor
    page_size: int


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Scales (whole factors, fp32) of the query and key norms over the head dim."""

    query_D: Tensor
    key_D: Tensor
    eps: float
