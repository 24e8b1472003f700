"""The routed experts that one process holds, and those of them that it serves.

Shapes: T tokens, K experts per token, D model width, E experts of the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import Matrix, restacked
from divisi.kernels.mixture.layout import Routed
from divisi.kernels.native.memory import return_freed_memory
from divisi.kernels.select import Kernels
from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.placement import ExpertShare, Layout, share_of
from divisi.model.weights import Progress

LayerExperts = tuple[Matrix, Matrix]
"""``gate_up_EFD`` and ``down_EDI`` of the experts held, in the order of their ids, as the kernels want them."""


class LeavesNotHeld(Exception):
    """A layout has a process serve virtual shards that it does not hold."""


@dataclass(frozen=True, slots=True, eq=False)
class _Stack:
    """Which experts lie one after another in the matrices of a layer."""

    expert_ids: tuple[int, ...]
    tree: Tree

    @classmethod
    def of(cls, share: ExpertShare, device: torch.device) -> Self:
        return cls(share.expert_ids, Tree.of(share.expert_ids, share.leaves, device))


class ServedExperts:
    """Those of a bank's experts that are served, in every MoE layer; asked by the ids of the whole model."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Mapping[int, tuple[_Stack, LayerExperts]],
        share: ExpertShare,
        num_experts: int,
        device: torch.device,
    ) -> None:
        """`layers` are the bank's: from one call to the next, others may lie in their stacks, besides these."""
        self._kernels, self._layers, self._share, self._num_experts = kernels, layers, share, num_experts
        self._device = device
        self._places: dict[_Stack, list[Tensor | None]] = {}

    @property
    def leaves(self) -> frozenset[int]:
        """The virtual shards that are served."""
        return frozenset(e % self._share.leaves for e in self._share.expert_ids)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``y_TD`` (fp32): the sum of gate x expert(x) over those of each token's experts that are served here.

        In the model's tree. A share of several subtrees gives the sum of each, one beside the other: D is so many
        times as wide.
        """
        stack, matrices = self._layers[layer]
        sums = [
            self._kernels.routed_experts(x_TD, _local(expert_ids_TK, local_E), gates_TK, stack.tree, *matrices)
            for local_E in self._places_in(stack)
        ]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """The sum over all experts, which are held here, or what it is the sum of."""
        stack, matrices = self._layers[layer]
        [local_E] = self._places_in(stack)  # one sum
        return self._kernels.mixture.routed(x_TD, _local(expert_ids_TK, local_E), gates_TK, stack.tree, *matrices)

    def _places_in(self, stack: _Stack) -> list[Tensor | None]:
        """Of each subtree, where in a stack its experts are, by their ids; None where they lie at their ids."""
        if (found := self._places.get(stack)) is None:
            found = self._places[stack] = [self._find(tree, stack) for tree in self._share.subtrees]
        return found

    def _find(self, tree: range, stack: _Stack) -> Tensor | None:
        """-1 for all experts but those of a subtree."""
        own = [e for e in self._share.expert_ids if e % self._share.leaves in tree]
        if own == list(stack.expert_ids) == list(range(self._num_experts)):
            return None
        place = {expert: at for at, expert in enumerate(stack.expert_ids)}
        local_E = torch.full((self._num_experts,), -1, dtype=torch.int32, device=self._device)
        local_E[own] = torch.tensor([place[e] for e in own], dtype=torch.int32, device=self._device)
        return local_E


def _local(expert_ids_TK: Tensor, local_E: Tensor | None) -> Tensor:
    return expert_ids_TK if local_E is None else local_E[expert_ids_TK]


class ExpertBank:
    """The experts of some virtual shards, in every MoE layer. Itself, it serves all of them."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Collection[int],
        num_experts: int,
        num_leaves: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Empty."""
        self._kernels, self._moe_layers, self._num_experts = kernels, tuple(layers), num_experts
        self.num_leaves = num_leaves
        """Virtual shards of the model."""
        self._dtype = dtype
        self.device = device
        """Where the experts are."""
        self._layers: dict[int, tuple[_Stack, LayerExperts]] = {}
        self._serve_all(share_of(num_experts, num_leaves, ()))
        self._served: weakref.ref[ServedExperts] | None = None
        self._lock = threading.Lock()

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
        layers = (*config.moe_layers, *config.draft_moe_layers)
        bank = cls(kernels, layers, config.num_experts, share.leaves, dtype, device)
        bank.hold(checkpoint, config, {expert % share.leaves for expert in share.expert_ids}, progress)
        return bank

    @property
    def bank(self) -> ExpertBank | None:
        """Itself, if it holds all experts in the order of their ids."""
        return self if len(self._stack.expert_ids) == self._num_experts else None

    @property
    def layers(self) -> Mapping[int, LayerExperts]:
        """Every layer's."""
        return {layer: matrices for layer, (_, matrices) in self._layers.items()}

    @property
    def tree(self) -> Tree:
        """In which a token's experts are summed."""
        return self._stack.tree

    @property
    def nbytes(self) -> int:
        """Bytes of the weights held."""
        return sum(tensor.nbytes for pair in self.layers.values() for tensor in pair)

    @property
    def held(self) -> frozenset[int]:
        """The virtual shards that can be served."""
        return self._held

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """See ServedExperts."""
        return self._all.partial_sum(layer, x_TD, expert_ids_TK, gates_TK)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """See ServedExperts."""
        return self._all.routed(layer, x_TD, expert_ids_TK, gates_TK)

    def serving(self, layout: Layout, seat: int) -> ServedExperts:
        """What a seat serves in a layout, of these same weights. Raises LeavesNotHeld.

        It stays here as long as the returned lives, or the next is asked for: a process serves in one epoch at a time.
        """
        own = layout.served[seat]
        served = self._view(self._share(own))
        with self._lock:
            if layout.leaves != self.num_leaves or not self._held.issuperset(own):
                told = f"{sorted(set(own) - self._held)} of {layout.leaves}"
                raise LeavesNotHeld(f"expert:{seat} is to serve virtual shards {told} that it does not hold")
            self._served = weakref.ref(served)
        return served

    def hold(
        self, checkpoint: Checkpoint, config: ModelConfig, leaves: Collection[int], progress: Progress | None = None
    ) -> None:
        """Hold these virtual shards from now on, and what is being served: read what lacks, give up the rest.

        Goes from layer to layer while others serve steps: what stays of a layer is there twice for as long as that one
        is under way, and nothing else is. What is given up cannot be served any more at once, what is read once all of
        it is there. One call at a time. Raises CheckpointError; what was read until then stays, and is not read again.
        """
        with self._lock:
            served = None if self._served is None else self._served()
            wanted = frozenset(leaves) | (frozenset() if served is None else served.leaves)
            self._held &= wanted
        share = self._share(wanted)
        stack = _Stack.of(share, self.device)
        for layer in self._moe_layers:
            self._layers[layer] = stack, self._restacked(layer, stack, checkpoint, config)
            return_freed_memory()
            if progress is not None:
                progress(checkpoint.bytes_read)
        self._serve_all(share)

    def _restacked(self, layer: int, stack: _Stack, checkpoint: Checkpoint, config: ModelConfig) -> LayerExperts:
        """A layer's experts as they are to lie, those that are not here yet read."""
        stacks: list[LayerExperts] = []
        picks: dict[int, tuple[int, int]] = {}
        if layer in self._layers:
            old, kept = self._layers[layer]
            stacks, picks = [kept], {expert: (0, at) for at, expert in enumerate(old.expert_ids)}
        missing = [expert for expert in stack.expert_ids if expert not in picks]
        if missing or not stacks:
            gate_up_EFD, down_EDI = checkpoint.read_experts(layer, missing, config, self._dtype)
            picks |= {expert: (len(stacks), at) for at, expert in enumerate(missing)}
            stacks.append(self._kernels.pack_experts(gate_up_EFD.to(self.device), down_EDI.to(self.device)))
            del gate_up_EFD, down_EDI
        wanted = [picks[expert] for expert in stack.expert_ids]
        gate_up, down = (restacked(of_each, wanted) for of_each in zip(*stacks, strict=True))
        return gate_up, down

    def _serve_all(self, share: ExpertShare) -> None:
        self._stack, self._all = _Stack.of(share, self.device), self._view(share)
        self._held = self._all.leaves

    def _view(self, share: ExpertShare) -> ServedExperts:
        return ServedExperts(self._kernels, self._layers, share, self._num_experts, self.device)

    def _share(self, leaves: Collection[int]) -> ExpertShare:
        return share_of(self._num_experts, self.num_leaves, leaves)
