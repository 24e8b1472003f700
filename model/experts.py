"""The routed experts that one process holds.

Shapes: T tokens, K experts per token, D model width, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from divisi.kernels.linear.layout import Matrix
from divisi.kernels.native.memory import return_freed_memory
from divisi.kernels.select import Kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.weights import Progress

LayerExperts = tuple[Matrix, Matrix]
"""``gate_up_EFD`` and ``down_EDI`` of the experts held, in the order of their ids, as the kernels want them."""


class ExpertBank:
    """Some of the model's routed experts, in every MoE layer; asked by the ids of the whole model."""

    def __init__(
        self, kernels: Kernels, layers: Mapping[int, LayerExperts], expert_ids: Sequence[int], num_experts: int
    ) -> None:
        self._kernels = kernels
        self._layers = dict(layers)
        device = next(iter(self._layers.values()))[0].device if self._layers else torch.device("cpu")
        self._local_E = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        self._local_E[list(expert_ids)] = torch.arange(len(expert_ids), dtype=torch.int32, device=device)
        self._holds_all = list(expert_ids) == list(range(num_experts))

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        expert_ids: Sequence[int],
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> Self:
        """Read the given experts of every MoE layer, of the MTP layer too, and nothing else. Raises CheckpointError."""
        layers: dict[int, LayerExperts] = {}
        for layer in (*config.moe_layers, *config.draft_moe_layers):
            gate_up_EFD, down_EDI = checkpoint.read_experts(layer, expert_ids, config, dtype)
            layers[layer] = kernels.pack_experts(gate_up_EFD.to(device), down_EDI.to(device))
            del gate_up_EFD, down_EDI
            if progress is not None:
                progress(checkpoint.bytes_read)
        return_freed_memory()
        return cls(kernels, layers, expert_ids, config.num_experts)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``y_TD`` (fp32): the sum of gate x expert(x) over those of each token's experts that are held here."""
        local_TK = expert_ids_TK if self._holds_all else self._local_E[expert_ids_TK]
        return self._kernels.routed_experts(x_TD, local_TK, gates_TK, *self._layers[layer])
