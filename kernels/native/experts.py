"""Routed experts and dense SwiGLU in C++.

Shapes: as in the reference of each operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix, PackedMatrix, plain_rows
from divisi.kernels.native.dense import Dense, pack
from divisi.kernels.native.loader import Library, pointer


class Experts:
    """SwiGLU layers, one or many."""

    def __init__(self, library: Library, dense: Dense) -> None:
        self._library, self._functions, self._dense = library, library.functions, dense
        self._alone = Tree.of([0], 1)

    def pack_experts(self, gate_up_EFD: Tensor, down_EDI: Tensor) -> tuple[Matrix, Matrix]:
        if not self._library.variant.bf16 or gate_up_EFD.dtype is not torch.bfloat16:
            return gate_up_EFD, down_EDI
        _, width, inner = down_EDI.shape
        gate_up = PackedMatrix(pack(self._library, gate_up_EFD, inner, halves=True), 2 * inner, width)
        return gate_up, PackedMatrix(pack(self._library, down_EDI, width, halves=False), width, inner)

    def pack_mlp(self, gate_up_FD: Tensor, down_DI: Tensor) -> tuple[Matrix, Matrix]:
        if not self._library.variant.bf16 or gate_up_FD.dtype is not torch.bfloat16:
            return gate_up_FD, down_DI
        return self.pack_experts(gate_up_FD[None], down_DI[None])

    def mlp(self, x_TD: Tensor, gate_up_FD: Matrix, down_DI: Matrix) -> Tensor:
        if isinstance(gate_up_FD, PackedMatrix):  # the only expert, of all rows
            return self._packed_experts(x_TD, None, None, self._alone, gate_up_FD, down_DI)
        up_FD, out_DI = plain_rows(gate_up_FD), plain_rows(down_DI)
        tokens, (width, inner) = x_TD.shape[0], out_DI.shape
        if not self._dense.is_few(tokens):
            return self._dense.linear(self._dense.silu_mul(self._dense.linear(x_TD, up_FD)), out_DI)
        y_TD = torch.empty((tokens, width))
        self._functions.divisi_mlp(
            pointer(x_TD), pointer(up_FD), pointer(out_DI), up_FD.dtype is torch.bfloat16, y_TD.data_ptr(),
            tokens, x_TD.shape[1], inner, torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def routed_experts(
        self,
        x_TD: Tensor,
        local_ids_TK: Tensor,
        gates_TK: Tensor,
        tree: Tree,
        gate_up_EFD: Matrix,
        down_EDI: Matrix,
    ) -> Tensor:
        if isinstance(gate_up_EFD, PackedMatrix):
            return self._packed_experts(x_TD, local_ids_TK, gates_TK, tree, gate_up_EFD, down_EDI)
        up_EFD, out_EDI = plain_rows(gate_up_EFD), plain_rows(down_EDI)
        (tokens, chosen), (experts, width, inner) = local_ids_TK.shape, out_EDI.shape
        y_TD = torch.empty((tokens, width))
        inner_PI = torch.empty((tokens * chosen, inner))
        parts_PD = torch.empty((tokens * chosen, width))
        self._functions.divisi_experts(
            pointer(x_TD), pointer(local_ids_TK), pointer(gates_TK), tree.leaves_E.data_ptr(),
            up_EFD.data_ptr(), out_EDI.data_ptr(), up_EFD.dtype is torch.bfloat16,
            inner_PI.data_ptr(), parts_PD.data_ptr(), y_TD.data_ptr(),
            tokens, chosen, width, inner, experts, torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def _packed_experts(
        self,
        x_TD: Tensor,
        ids_TK: Tensor | None,
        gates_TK: Tensor | None,
        tree: Tree,
        gate_up: PackedMatrix,
        down: Matrix,
    ) -> Tensor:
        """Without ids all rows go to the only expert, unweighted."""
        assert isinstance(down, PackedMatrix), "both are packed, or none"
        tokens, chosen = (x_TD.shape[0], 1) if ids_TK is None else ids_TK.shape
        ids, gates = (None if values is None else pointer(values) for values in (ids_TK, gates_TK))
        y_TD = torch.empty((tokens, down.outputs))
        self._functions.divisi_packed_experts(
            pointer(x_TD), ids, gates, tree.leaves_E.data_ptr(), gate_up.data.data_ptr(), down.data.data_ptr(),
            y_TD.data_ptr(), tokens, chosen, down.outputs, down.inputs, down.data.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return y_TD

    def add_shared(self, routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor:
        tokens, width = shared_TD.shape
        y_TD = torch.empty((tokens, width))
        self._functions.divisi_add_shared(
            pointer(routed_TD), pointer(shared_TD), logits_T.data_ptr(), logits_T.stride(0), y_TD.data_ptr(),
            tokens, width, torch.get_num_threads(),
        )  # fmt: skip
        return y_TD
