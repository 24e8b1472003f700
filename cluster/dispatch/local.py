"""Experts in the same process: no communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Experts(Protocol):
    """The routed experts that a rank holds."""

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """``y_TD`` fp32: per token, the sum of gate x expert(x) over those of its experts that are held here."""
        ...


class LocalDispatcher:
    """Runs the experts when the sum is asked for."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _LocalPending:
        """See `divisi.model.dispatcher.Dispatcher`."""
        return _LocalPending(self._experts, layer, x_TD, expert_ids_TK, gates_TK)


@dataclass(frozen=True, slots=True)
class _LocalPending:
    experts: Experts
    layer: int
    x_TD: Tensor
    expert_ids_TK: Tensor
    gates_TK: Tensor

    def combine(self) -> Tensor:
        return self.experts.partial_sum(self.layer, self.x_TD, self.expert_ids_TK, self.gates_TK)
