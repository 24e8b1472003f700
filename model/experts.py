"""The routed experts that one process holds.

Shapes: T tokens, K experts per token, D model width, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix
from divisi.kernels.mixture.layout import Routed
from divisi.kernels.native.memory import return_freed_memory
from divisi.kernels.select import Kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.placement import ExpertShare
from divisi.model.weights import Progress

LayerExperts = tuple[Matrix, Matrix]
"""``gate_up_EFD`` and ``down_EDI`` of the experts held, in the order of their ids, as the kernels want them."""


class ExpertBank:
    """Some of the model's routed experts, in every MoE layer; asked by the ids of the whole model."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Mapping[int, LayerExperts],
        share: ExpertShare,
        num_experts: int,
    ) -> None:
        self._kernels = kernels
        self._layers = dict(layers)
        self.device = device = next(iter(self._layers.values()))[0].device if self._layers else torch.device("cpu")
        """Where the experts are."""
        self._tree = Tree.of(share.expert_ids, share.leaves, device)
        self._local_E = _places(share.expert_ids, share.expert_ids, num_experts, device)
        self._holds_all = list(share.expert_ids) == list(range(num_experts))
        parts = [[e for e in share.expert_ids if e % share.leaves in own] for own in share.subtrees]
        self._subtrees_E = [_places(part, share.expert_ids, num_experts, device) for part in parts]

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        share: ExpertShare,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Self:
        """Read a share's experts of every MoE layer, of the MTP layer too, and nothing else. Raises CheckpointError."""
        layers: dict[int, LayerExperts] = {}
        for layer in (*config.moe_layers, *config.draft_moe_layers):
            gate_up_EFD, down_EDI = checkpoint.read_experts(layer, share.expert_ids, config, dtype)
            layers[layer] = kernels.pack_experts(gate_up_EFD.to(device), down_EDI.to(device))
            del gate_up_EFD, down_EDI
            if progress is not None:
                progress(checkpoint.bytes_read)
        return_freed_memory()
        return cls(kernels, layers, share, config.num_experts)

    @property
    def bank(self) -> ExpertBank | None:
        """Itself, if it holds all experts in the order of their ids."""
        return self if self._holds_all else None

    @property
    def layers(self) -> Mapping[int, LayerExperts]:
        """Every layer's."""
        return self._layers

    @property
    def tree(self) -> Tree:
        """In which a token's experts are summed."""
        return self._tree

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``y_TD`` (fp32): the sum of gate x expert(x) over those of each token's experts that are held here.

        In the model's tree. A share of several subtrees gives the sum of each, one beside the other: D is so many
        times as wide.
        """
        if len(self._subtrees_E) > 1:
            places = [local_E[expert_ids_TK] for local_E in self._subtrees_E]
            return torch.cat([self._run(layer, x_TD, local_TK, gates_TK) for local_TK in places], dim=1)
        return self._run(layer, x_TD, self._local(expert_ids_TK), gates_TK)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """The sum over all experts, which are held here, or what it is the sum of."""
        assert len(self._subtrees_E) == 1, "one sum"
        local_TK = self._local(expert_ids_TK)
        return self._kernels.mixture.routed(x_TD, local_TK, gates_TK, self._tree, *self._layers[layer])

    def _local(self, expert_ids_TK: Tensor) -> Tensor:
        return expert_ids_TK if self._holds_all else self._local_E[expert_ids_TK]

    def _run(self, layer: int, x_TD: Tensor, local_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self._kernels.routed_experts(x_TD, local_TK, gates_TK, self._tree, *self._layers[layer])


def _places(expert_ids: Sequence[int], held: Sequence[int], num_experts: int, device: torch.device) -> Tensor:
    """Where each of the model's experts lies among those held; -1 for all but the given ones."""
    place = {expert: at for at, expert in enumerate(held)}
    local_E = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
    local_E[list(expert_ids)] = torch.tensor([place[e] for e in expert_ids], dtype=torch.int32, device=device)
    return local_E
