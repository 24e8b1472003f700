"""Gated attention over pages in C++.

Shapes: as in its reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.attention.reference import attend_runs
from divisi.kernels.native.loader import Library, pointer


class Attention:
    """Layers over pages."""

    def __init__(self, library: Library, deterministic: bool) -> None:
        self._library, self._functions = library, library.functions
        self._deterministic = deterministic

    def attention_inputs(
        self, rows_TP: Tensor, cos_sin_TR: Tensor, norm: QkNorm, pool: KvPool, kv_rows_T: Tensor, num_heads: int
    ) -> Tensor:
        _, kv_heads, dim = pool.key_PJD.shape
        tokens = rows_TP.shape[0]
        q_TQD = torch.empty((tokens, num_heads, dim))
        self._functions.divisi_attention_inputs(
            pointer(rows_TP), pointer(cos_sin_TR), norm.query_D.data_ptr(), norm.key_D.data_ptr(), norm.eps,
            pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(), pool.key_PJD.dtype is torch.bfloat16,
            pointer(kv_rows_T), q_TQD.data_ptr(), tokens, num_heads, kv_heads, dim, cos_sin_TR.shape[1] // 2,
            torch.get_num_threads(),
        )  # fmt: skip
        return q_TQD

    def attention_decode(
        self,
        q_TQD: Tensor,
        rows_TP: Tensor,
        pool: KvPool,
        starts_S1: Tensor,
        lengths_S: Tensor,
        pages_SN: Tensor,
        first: int = 0,
    ) -> Tensor:
        tokens, heads, dim = q_TQD.shape
        out_TX = torch.empty((tokens, heads * dim))
        if self._tiles(pool):
            self._functions.divisi_tiled_attention(
                pointer(q_TQD), pointer(rows_TP), pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(), pool.page_size,
                pointer(starts_S1), pointer(lengths_S), pages_SN.data_ptr(), pages_SN.stride(0), first,
                out_TX.data_ptr(), lengths_S.shape[0], heads, pool.key_PJD.shape[1], dim, torch.get_num_threads(),
            )  # fmt: skip
            return out_TX
        self._functions.divisi_attention(
            pointer(q_TQD), pointer(rows_TP), pool.key_PJD.data_ptr(), pool.value_PJD.data_ptr(),
            pool.key_PJD.dtype is torch.bfloat16, pool.page_size, pointer(starts_S1), pointer(lengths_S),
            pages_SN.data_ptr(), pages_SN.stride(0), first, out_TX.data_ptr(), lengths_S.shape[0], heads,
            pool.key_PJD.shape[1], dim, torch.get_num_threads(),
        )  # fmt: skip
        return out_TX

    def attention_prefill(
        self, q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor
    ) -> Tensor:
        attend = self.attention_decode if self._deterministic or self._tiles(pool) else attend_runs
        return attend(q_TQD, rows_TP, pool, starts_S1, lengths_S, pages_SN)

    def _tiles(self, pool: KvPool) -> bool:
        """Whether scanned and decoded rows attend alike, tile by tile."""
        return self._library.variant.bf16 and pool.key_PJD.dtype is torch.bfloat16
