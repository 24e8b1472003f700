"""Which experts get how many rows, and how long they take: counted in some steps, since counting costs, too.

Shapes: T rows, D model width, K experts per row, L layers, E experts of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from divisi.cluster.dispatch.protocol import AllExperts
from divisi.kernels.mixture.layout import Routed
from divisi.model.experts import ExpertBank

T = TypeVar("T")


class MeteredExperts:
    """The experts of a rank, with a meter. Implements `AllExperts`."""

    def __init__(
        self, experts: AllExperts, layers: Sequence[int], held: Sequence[int], num_experts: int, device: torch.device
    ) -> None:
        """`held` are the ids of the experts of this rank, of `num_experts` in each of `layers`."""
        self._experts = experts
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._held = torch.tensor(held, dtype=torch.int64, device=device)
        self._counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self.measuring = False
        """Whether what comes is counted. For the thread that runs the steps."""
        self.seconds = 0.0
        """Spent in measured calls; on a GPU, until they were launched."""

    @property
    def bank(self) -> ExpertBank | None:
        """See AllExperts: there is nothing to see between two measurements."""
        return None if self.measuring else self._experts.bank

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """See Experts."""
        return self._measured(self._experts.partial_sum, layer, x_TD, expert_ids_TK, gates_TK)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """See AllExperts."""
        return self._measured(self._experts.routed, layer, x_TD, expert_ids_TK, gates_TK)

    def _measured(
        self,
        call: Callable[[int, Tensor, Tensor, Tensor], T],
        layer: int,
        x_TD: Tensor,
        ids_TK: Tensor,
        gates_TK: Tensor,
    ) -> T:
        if not self.measuring:
            return call(layer, x_TD, ids_TK, gates_TK)
        begin = perf_counter()
        y_TD = call(layer, x_TD, ids_TK, gates_TK)
        self.seconds += perf_counter() - begin
        ids = ids_TK.reshape(-1).long()
        self._counts_LE[self._rows[layer]].scatter_add_(0, ids.clamp(min=0), (ids >= 0).long())  # -1 is no expert
        return y_TD

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        """By layer: rows of the experts held, those of the busiest over the mean, and their spread over the mean."""
        with torch.inference_mode():
            counts_LE = self._counts_LE[:, self._held].double().cpu()
            mean_L = counts_LE.mean(1).clamp(min=1e-9)
            found = {
                "expert_tokens": counts_LE.sum(1),
                "expert_busiest": counts_LE.amax(1) / mean_L,
                "expert_spread": counts_LE.std(1, correction=0) / mean_L,
            }
        names = [str(layer) for layer in self._rows]
        return {name: dict(zip(names, of_L.tolist(), strict=True)) for name, of_L in found.items()}
