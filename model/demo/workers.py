"""Processes that train one network in shared memory, each on its own batch, each updating its own parameters.

Threads of one process would wait for each other after every small operation; these wait twice a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor, nn

from divisi.model.demo.muon import Optimiser, cost
from divisi.model.demo.network import Network

_LONGEST_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What all workers see."""

    network: Network
    gradients: list[Tensor]
    """One flat buffer per worker."""
    barrier: Barrier


class Worker:
    """One worker's side of a step."""

    def __init__(self, shared: Shared, rank: int, muon_rate: float, adam_rate: float, prefix: str = "") -> None:
        """Trains the parameters whose names start with `prefix`; the others stay as they are."""
        self._shared, self._rank = shared, rank
        for name, parameter in shared.network.named_parameters():
            parameter.requires_grad_(name.startswith(prefix))
        self._parameters = {name: p for name, p in shared.network.named_parameters() if p.requires_grad}
        self._views = [_views(buffer, self._parameters) for buffer in shared.gradients]
        for name, parameter in self._parameters.items():
            parameter.grad = self._views[rank][name]
        mine = _share(self._parameters, rank, len(shared.gradients))
        width = shared.network.config.moe_intermediate_size
        self._optimiser = Optimiser({name: self._parameters[name] for name in mine}, muon_rate, adam_rate, width)
        self._mine = mine

    def clear(self) -> None:
        """Before the backward pass."""
        self._shared.gradients[self._rank].zero_()

    def update(self, factor: float, clip: float = 1.0) -> float:
        """After the backward pass: wait for all, update this worker's parameters, wait; returns the gradient's norm."""
        self._shared.barrier.wait(_LONGEST_WAIT_S)
        total = torch.stack(self._shared.gradients).mean(0)
        norm = float(torch.linalg.vector_norm(total))
        total *= min(1.0, clip / (norm + 1e-6))
        means = _views(total, self._parameters)
        self._optimiser.step({name: means[name] for name in self._mine}, factor)
        self._shared.barrier.wait(_LONGEST_WAIT_S)
        return norm


def flat_buffer(network: nn.Module) -> Tensor:
    """Shared memory for one worker's gradients."""
    buffer = torch.zeros(sum(parameter.numel() for parameter in network.parameters()))
    buffer.share_memory_()
    return buffer


def _views(buffer: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    views, at = {}, 0
    for name, parameter in parameters.items():
        views[name] = buffer[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return views


def _share(parameters: dict[str, nn.Parameter], rank: int, workers: int) -> list[str]:
    """The names that a worker updates: the costliest first, each to the worker with the least so far."""
    loads = [0] * workers
    mine = []
    for name in sorted(parameters, key=lambda name: (-cost(name, parameters[name]), name)):
        to = loads.index(min(loads))
        loads[to] += cost(name, parameters[name])
        if to == rank:
            mine.append(name)
    return mine
