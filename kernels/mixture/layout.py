"""What goes into a mixture of experts and comes out of it, as far as it is not the experts' own.

Shapes: T tokens, K experts per token, E experts, D model width, I inner width of the shared expert, F = 2 I, P = T K.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix


@dataclass(frozen=True, slots=True)
class MixtureMatrices:
    """A layer's router and shared expert."""

    inputs_ND: Matrix
    """What every row is multiplied with first: one row per expert, then the shared expert's gate; where
    ``shared_gate_up_FD`` is None, the F rows of that come before them, and zeros fill up the last 16."""
    shared_gate_up_FD: Matrix | None
    shared_down_DI: Matrix
    experts: int
    """E."""


@dataclass(frozen=True, slots=True)
class MixtureRows:
    """What a layer's rows go on with."""

    ids_TK: Tensor
    """int32: see route."""
    gates_TK: Tensor
    gate_T: Tensor
    """Logit of the shared expert's gate; may be strided."""
    inner_TI: Tensor | None
    """The shared expert's inner values, where they are there already."""


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """The outputs of each token's experts, for whoever sums them: gate x part, in a tree."""

    parts_PD: Tensor
    ids_TK: Tensor
    """int32; -1 marks an expert held elsewhere, whose part is not there."""
    gates_TK: Tensor
    tree: Tree


Routed = Tensor | ExpertParts
"""The routed experts' ``y_TD`` (fp32), or what it is the sum of."""


@dataclass(frozen=True, slots=True)
class MixtureUpdate:
    """What a mixture adds to the residual: ``routed + sigmoid(gate) * shared``."""

    routed: Routed
    shared_TD: Tensor
    gate_T: Tensor

    def __getitem__(self, rows_R: Tensor) -> MixtureUpdate:
        """That of some rows."""
        routed = self.routed
        if isinstance(routed, ExpertParts):
            chosen, width = routed.ids_TK.shape[1], routed.parts_PD.shape[1]
            parts_RKD = routed.parts_PD.view(-1, chosen, width)[rows_R]
            ids_RK, gates_RK = routed.ids_TK[rows_R], routed.gates_TK[rows_R]
            kept: Routed = ExpertParts(parts_RKD.flatten(0, 1), ids_RK, gates_RK, routed.tree)
        else:
            kept = routed[rows_R]
        return MixtureUpdate(kept, self.shared_TD[rows_R], self.gate_T[rows_R])


Update = Tensor | MixtureUpdate
"""What a layer adds to the residual."""
