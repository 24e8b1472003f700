"""Experts in the same process: no communication."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from divisi.cluster.dispatch.protocol import AllExperts, Peers, WorkerEnd
from divisi.cluster.passes import Pass
from divisi.kernels.mixture.layout import Routed
from divisi.model.dispatcher import InProcess
from divisi.model.experts import ExpertBank


@dataclass(frozen=True, slots=True)
class Local:
    """The mode of ranks that hold all experts. It needs no peers: `LocalEnd(experts)` is a dispatcher by itself."""

    experts: AllExperts

    def worker_end(self, peers: Peers) -> WorkerEnd:
        """See DispatchMode."""
        return LocalEnd(self.experts)


class LocalEnd(InProcess):
    """Runs the experts when the sum is asked for."""

    def __init__(self, experts: AllExperts) -> None:
        self._experts = experts

    @property
    def bank(self) -> ExpertBank | None:
        """See `divisi.model.dispatcher.InProcess`."""
        return self._experts.bank

    def begin(self, step_pass: Pass) -> None:
        """See WorkerEnd."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> _LocalPending:
        """See `divisi.model.dispatcher.Dispatcher`."""
        return _LocalPending(self._experts, layer, x_TD, expert_ids_TK, gates_TK)

    def idle(self, layer: int) -> None:
        """See WorkerEnd."""

    def carried_all(self) -> bool:
        """See WorkerEnd."""
        return True


@dataclass(frozen=True, slots=True)
class _LocalPending:
    experts: AllExperts
    layer: int
    x_TD: Tensor
    expert_ids_TK: Tensor
    gates_TK: Tensor

    def combine(self) -> Routed:
        return self.experts.routed(self.layer, self.x_TD, self.expert_ids_TK, self.gates_TK)
