"""A mixture made of the operations that a device has anyway: they are its reference.

Shapes: as in layout.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix
from divisi.kernels.mixture.layout import MixtureMatrices, MixtureRows, Routed, Update


class Operations(Protocol):
    """What it is made of: see `Kernels`."""

    def pack_linear(self, weight_NK: Tensor) -> Matrix: ...
    def pack_mlp(self, gate_up_FD: Tensor, down_DI: Tensor) -> tuple[Matrix, Matrix]: ...
    def linear(self, x_TK: Tensor, weight_NK: Matrix) -> Tensor: ...
    def mlp(self, x_TD: Tensor, gate_up_FD: Matrix, down_DI: Matrix) -> Tensor: ...
    def route(self, logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]: ...
    def routed_experts(
        self, x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix
    ) -> Tensor: ...
    def add_shared(self, routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor: ...
    def add_rms_norm(self, residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor: ...


class MixtureKernels(Protocol):
    """The steps of a mixture; `ComposedMixture` specifies them."""

    def pack(self, router_ED: Tensor, gate_D: Tensor, gate_up_FD: Tensor, down_DI: Tensor) -> MixtureMatrices:
        """Lay out the matrices; ``gate_D`` is the shared expert's gate."""
        ...

    def inputs(
        self, x_TD: Tensor, matrices: MixtureMatrices, num_chosen: int, normalise: bool, starts_S1: Tensor | None = None
    ) -> MixtureRows:
        """Choose each row's experts; where ``starts`` is told, rows from its last one on are padding: they get -1."""
        ...

    def shared(self, x_TD: Tensor, rows: MixtureRows, matrices: MixtureMatrices) -> Tensor:
        """Return the shared expert's output, without its gate."""
        ...

    def routed(
        self, x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix
    ) -> Routed:
        """As `routed_experts`, but whoever adds the result to the residual may have to sum it."""
        ...

    def combined(self, routed: Routed, shared_TD: Tensor, gate_T: Tensor) -> Update:
        """Return ``routed + sigmoid(gate) * shared``, which `add_norm` may have to sum."""
        ...

    def add_norm(self, residual_TD: Tensor, update: Update, scale_D: Tensor, eps: float) -> Tensor:
        """Add a layer's update to the residual in place, then return the norm of the sum."""
        ...


class ComposedMixture:
    """One operation after another. Implements `MixtureKernels`."""

    def __init__(self, kernels: Operations) -> None:
        self._kernels = kernels

    def pack(self, router_ED: Tensor, gate_D: Tensor, gate_up_FD: Tensor, down_DI: Tensor) -> MixtureMatrices:
        """See MixtureKernels."""
        inputs_ND = self._kernels.pack_linear(torch.cat([router_ED, gate_D[None]]))
        return MixtureMatrices(inputs_ND, *self._kernels.pack_mlp(gate_up_FD, down_DI), len(router_ED))

    def inputs(
        self, x_TD: Tensor, matrices: MixtureMatrices, num_chosen: int, normalise: bool, starts_S1: Tensor | None = None
    ) -> MixtureRows:
        """See MixtureKernels."""
        logits_TN = self._kernels.linear(x_TD, matrices.inputs_ND)
        ids_TK, gates_TK = self._kernels.route(logits_TN[:, : matrices.experts], num_chosen, normalise)
        if starts_S1 is not None:
            padding_T = torch.arange(x_TD.shape[0], device=x_TD.device) >= starts_S1[-1]
            ids_TK = ids_TK.masked_fill(padding_T[:, None], -1)
        return MixtureRows(ids_TK, gates_TK, logits_TN[:, matrices.experts], None)

    def shared(self, x_TD: Tensor, rows: MixtureRows, matrices: MixtureMatrices) -> Tensor:
        """See MixtureKernels."""
        assert matrices.shared_gate_up_FD is not None, "packed here"
        return self._kernels.mlp(x_TD, matrices.shared_gate_up_FD, matrices.shared_down_DI)

    def routed(
        self, x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix
    ) -> Tensor:
        """See MixtureKernels."""
        return self._kernels.routed_experts(x_TD, local_ids_TK, gates_TK, tree, gate_up_EFD, down_EDI)

    def combined(self, routed: Routed, shared_TD: Tensor, gate_T: Tensor) -> Tensor:
        """See MixtureKernels."""
        assert isinstance(routed, Tensor), "summed here"
        return self._kernels.add_shared(routed, shared_TD, gate_T)

    def add_norm(self, residual_TD: Tensor, update: Update, scale_D: Tensor, eps: float) -> Tensor:
        """See MixtureKernels."""
        assert isinstance(update, Tensor), "combined here"
        return self._kernels.add_rms_norm(residual_TD, update, scale_D, eps)
