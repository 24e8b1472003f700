"""Norms, products and choosing experts in C++.

Shapes: as in the reference of each operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.linear.layout import Matrix, PackedMatrix, packed_values, plain_rows
from divisi.kernels.native.loader import Library, pointer
from divisi.kernels.native.memory import advise_huge_pages

# From this many rows on, a matrix product is bound by arithmetic and torch's blocked GEMM wins.
GEMM_ROWS = 48


class Dense:
    """What works on rows alone."""

    def __init__(self, library: Library, deterministic: bool) -> None:
        self._library, self._functions = library, library.functions
        self._deterministic = deterministic
        self._bf16_gemm = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def pack_linear(self, weight_NK: Tensor) -> Matrix:
        if not self._library.variant.bf16 or weight_NK.dtype is not torch.bfloat16:
            return weight_NK
        outputs, inputs = weight_NK.shape
        return PackedMatrix(pack(self._library, weight_NK[None], outputs, halves=False)[0], outputs, inputs)

    def is_few(self, tokens: int) -> bool:
        """Whether products of unpacked weights with so many rows stay here."""
        return tokens < GEMM_ROWS or self._deterministic

    def linear(self, x_TK: Tensor, weight_NK: Matrix) -> Tensor:
        tokens, inputs = x_TK.shape
        if isinstance(weight_NK, PackedMatrix):
            outputs = weight_NK.outputs
            y_TN = torch.empty((tokens, outputs))
            self._functions.divisi_packed_linear(
                pointer(x_TK), weight_NK.data.data_ptr(), y_TN.data_ptr(), tokens, outputs, inputs,
                torch.get_num_threads(),
            )  # fmt: skip
            return y_TN
        rows_NK = plain_rows(weight_NK)
        if not self.is_few(tokens):
            return self._gemm(x_TK, rows_NK)
        outputs = rows_NK.shape[0]
        y_TN = torch.empty((tokens, outputs))
        is_bf16 = rows_NK.dtype is torch.bfloat16
        self._functions.divisi_linear(
            pointer(x_TK),
            rows_NK.data_ptr(),
            is_bf16,
            y_TN.data_ptr(),
            tokens,
            outputs,
            inputs,
            torch.get_num_threads(),
        )
        return y_TN

    def _gemm(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        if weight_NK.dtype is torch.bfloat16 and self._bf16_gemm:
            return torch.nn.functional.linear(x_TK.bfloat16(), weight_NK).float()
        return torch.nn.functional.linear(x_TK, weight_NK.float())

    def embed(self, weight_NK: Matrix, rows_T: Tensor) -> Tensor:
        if not isinstance(weight_NK, PackedMatrix):
            return plain_rows(weight_NK)[rows_T]
        out_TK = torch.empty((rows_T.shape[0], weight_NK.inputs))
        self._functions.divisi_packed_rows(
            weight_NK.data.data_ptr(), pointer(rows_T), out_TK.data_ptr(), rows_T.shape[0],
            weight_NK.outputs, weight_NK.inputs,
        )  # fmt: skip
        return out_TK

    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return self._norm(x_TD, None, scale_D, eps)

    def add_rms_norm(self, residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return self._norm(residual_TD, pointer(update_TD), scale_D, eps)

    def _norm(self, x_TD: Tensor, update: int | None, scale_D: Tensor, eps: float) -> Tensor:
        out_TD = torch.empty_like(x_TD)
        self._functions.divisi_add_rms_norm(
            pointer(x_TD), update, scale_D.data_ptr(), out_TD.data_ptr(), x_TD.shape[0], x_TD.shape[1], eps,
            torch.get_num_threads(),
        )  # fmt: skip
        return out_TD

    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor:
        tokens, width = gate_up_TI2.shape
        out_TI = torch.empty((tokens, width // 2))
        self._functions.divisi_silu_mul(
            pointer(gate_up_TI2), out_TI.data_ptr(), tokens, width // 2, torch.get_num_threads()
        )
        return out_TI

    def route(self, logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]:
        assert logits_TE.stride(1) == 1
        tokens, experts = logits_TE.shape
        ids_TK = torch.empty((tokens, num_chosen), dtype=torch.int32)
        gates_TK = torch.empty((tokens, num_chosen))
        self._functions.divisi_route(
            logits_TE.data_ptr(), logits_TE.stride(0), ids_TK.data_ptr(), gates_TK.data_ptr(),
            tokens, experts, num_chosen, normalise, torch.get_num_threads(),
        )  # fmt: skip
        return ids_TK, gates_TK


def pack(library: Library, weights_ENK: Tensor, outputs: int, *, halves: bool) -> Tensor:
    """Matrices in the order of native/bf16.h, flat; with `halves` gate and up rows take turns by blocks."""
    count, rows, inputs = weights_ENK.shape
    values = packed_values(outputs, inputs) * (2 if halves else 1)
    packed = advise_huge_pages(torch.empty((count, values), dtype=weights_ENK.dtype))
    library.functions.divisi_pack(
        pointer(weights_ENK), packed.data_ptr(), count, rows, inputs, halves, torch.get_num_threads()
    )
    return packed
