"""Which experts get how many rows, and how long they take: counted in some steps, since counting costs, too.

Shapes: T rows, D model width, K experts per row, L layers, E experts of the model, V virtual shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from divisi.cluster.dispatch.protocol import AllExperts, Experts, HeldExperts
from divisi.kernels.mixture.layout import Routed
from divisi.model.experts import ExpertBank
from divisi.model.placement import Layout

T = TypeVar("T")


class Bank(AllExperts, HeldExperts, Protocol):
    """What a rank holds; see `divisi.model.experts.ExpertBank`."""

    @property
    def held(self) -> frozenset[int]:
        """The virtual shards that it holds; where nobody asks for less, it serves them all."""
        ...


class MeteredExperts:
    """The experts of a rank, with a meter. Implements `AllExperts` and `HeldExperts`.

    Rows are counted where they are served, so that those of a whole gang add up, whoever holds copies of the experts.
    """

    def __init__(self, experts: Bank, layers: Sequence[int], num_experts: int, device: torch.device) -> None:
        """There are `num_experts` in each of `layers`."""
        self._experts, self._device = experts, device
        self._rows = {layer: row for row, layer in enumerate(layers)}
        self._leaf_E = torch.arange(num_experts, device=device) % experts.num_leaves
        self._counts_LE = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self._serve(experts.held)
        self.measuring = False
        """Whether what comes is counted. For the thread that runs the steps."""
        self.seconds = 0.0
        """Spent in measured calls; on a GPU, until they were launched."""

    @property
    def bank(self) -> ExpertBank | None:
        """See AllExperts: there is nothing to see between two measurements."""
        return None if self.measuring else self._experts.bank

    @property
    def num_leaves(self) -> int:
        """See HeldExperts."""
        return self._experts.num_leaves

    def serving(self, layout: Layout, seat: int) -> Experts:
        """See HeldExperts: the experts that the bank then holds, counted here."""
        served = self._experts.serving(layout, seat)
        if set(layout.served[seat]) != self._leaves:
            self._serve(layout.served[seat])
        return _Served(self, served)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """See Experts."""
        return self.measured(self._experts.partial_sum, layer, x_TD, expert_ids_TK, gates_TK)

    def routed(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Routed:
        """See AllExperts."""
        return self.measured(self._experts.routed, layer, x_TD, expert_ids_TK, gates_TK)

    def measured(
        self,
        call: Callable[[int, Tensor, Tensor, Tensor], T],
        layer: int,
        x_TD: Tensor,
        ids_TK: Tensor,
        gates_TK: Tensor,
    ) -> T:
        """What the experts make of rows, which are counted if it is time."""
        if not self.measuring:
            return call(layer, x_TD, ids_TK, gates_TK)
        begin = perf_counter()
        y_TD = call(layer, x_TD, ids_TK, gates_TK)
        self.seconds += perf_counter() - begin
        ids = ids_TK.reshape(-1).long()  # -1 is no expert
        self._counts_LE[self._rows[layer]].scatter_add_(0, ids.clamp(min=0), self._counted_E[ids])
        return y_TD

    def _serve(self, leaves: Collection[int]) -> None:
        """Count the rows of these from now on."""
        self._leaves = frozenset(leaves)
        wanted = torch.tensor(sorted(leaves), dtype=torch.int64, device=self._device)
        served_E = torch.isin(self._leaf_E, wanted)
        self._counted_E = torch.cat([served_E, served_E.new_zeros(1)]).long()
        """The last is where -1 leads to."""
        self._before = served_E, self._counts_LE.clone()
        """Which are served since when."""

    def leaf_rows(self) -> Tensor:
        """Rows [L, V] by layer and virtual shard that were served here, in measured steps."""
        rows_LV = self._counts_LE.new_zeros(len(self._rows), self.num_leaves)
        return rows_LV.index_add_(1, self._leaf_E, self._counts_LE)

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        """By layer: rows of the experts served, those of the busiest over the mean, their spread over the mean, both of
        what came since others were served. By virtual shard: rows in all layers.
        """
        with torch.inference_mode():
            served_E, before_LE = self._before
            counts_LE = (self._counts_LE - before_LE)[:, served_E].double().cpu()
            mean_L = counts_LE.mean(1).clamp(min=1e-9)
            found = {
                "expert_tokens": self._counts_LE.sum(1).double(),
                "expert_busiest": counts_LE.amax(1) / mean_L,
                "expert_spread": counts_LE.std(1, correction=0) / mean_L,
            }
            rows_V = self.leaf_rows().sum(0).tolist()
        names = [str(layer) for layer in self._rows]
        of_leaves = {str(leaf): float(rows) for leaf, rows in enumerate(rows_V) if rows or leaf in self._leaves}
        by_layer = {name: dict(zip(names, of_L.tolist(), strict=True)) for name, of_L in found.items()}
        return {**by_layer, "leaf_rows": of_leaves}


@dataclass(frozen=True, slots=True)
class _Served:
    """Implements Experts."""

    meter: MeteredExperts
    experts: Experts

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return self.meter.measured(self.experts.partial_sum, layer, x_TD, expert_ids_TK, gates_TK)
