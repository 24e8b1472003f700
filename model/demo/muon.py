"""The optimiser: Muon for matrices, AdamW for the rest, each worker updating its own share of the parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95
_BETAS = (0.9, 0.97)
_EPS = 1e-8


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices (Jordan et al. 2024), ``[N, rows, columns]``."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_STEPS):
        product = x @ x.mT
        x = a * x + (b * product + c * product @ product) @ x
    found: Tensor = x.mT if tall else x
    return found


@dataclass(slots=True)
class _Slot:
    name: str
    parameter: nn.Parameter
    matrices: bool
    first: Tensor
    second: Tensor | None
    rate: float


class Optimiser:
    """Updates parameters in place from gradients that the caller gives, by name."""

    def __init__(self, named: dict[str, nn.Parameter], muon_rate: float, adam_rate: float, expert_width: int) -> None:
        """`expert_width`: inner width of an expert, to tell the matrices of packed ones."""
        self._expert_width = expert_width
        self._slots = []
        self._step = 0
        for name, parameter in named.items():
            matrices = _is_matrix(name, parameter)
            rate = muon_rate if matrices else adam_rate
            second = None if matrices else torch.zeros_like(parameter)
            self._slots.append(_Slot(name, parameter, matrices, torch.zeros_like(parameter), second, rate))

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """One step at `factor` of the full rates."""
        self._step += 1
        for slot in self._slots:
            gradient = gradients[slot.name]
            if slot.second is None:
                self._muon(slot, gradient, factor)
            else:
                self._adam(slot, slot.second, gradient, factor)

    def _muon(self, slot: _Slot, gradient: Tensor, factor: float) -> None:
        slot.first.lerp_(gradient, 1 - _MOMENTUM)
        ahead = gradient.lerp(slot.first, _MOMENTUM)
        split = _matrices(slot.name, ahead, self._expert_width)
        update = orthogonalise(split) * max(1.0, split.shape[-2] / split.shape[-1]) ** 0.5
        target = _matrices(slot.name, slot.parameter.data, self._expert_width)
        target.mul_(1 - 0.02 * slot.rate * factor).sub_(update, alpha=slot.rate * factor)

    def _adam(self, slot: _Slot, second: Tensor, gradient: Tensor, factor: float) -> None:
        beta1, beta2 = _BETAS
        slot.first.lerp_(gradient, 1 - beta1)
        second.lerp_(gradient.square(), 1 - beta2)
        mean = slot.first / (1 - beta1**self._step)
        spread = (second / (1 - beta2**self._step)).sqrt_().add_(_EPS)
        slot.parameter.addcdiv_(mean, spread, value=-slot.rate * factor)


def cost(name: str, parameter: nn.Parameter) -> int:
    """About how much work an update of a parameter is, to share parameters fairly."""
    return parameter.numel() * (20 if _is_matrix(name, parameter) else 1)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return (
        parameter.dim() == 2
        and min(parameter.shape) >= 16
        and "embed" not in name
        and not name.endswith(".gate.weight")
    )


def _matrices(name: str, tensor: Tensor, inner: int) -> Tensor:
    """The matrices in a parameter, ``[N, rows, columns]``, views of it; packed experts count one by one."""
    if name.endswith("gate_up_DF"):
        split: Tensor = tensor.unflatten(1, (-1, inner)).permute(1, 2, 0)
        return split
    if name.endswith("down_FD"):
        split = tensor.unflatten(0, (-1, inner)).transpose(1, 2)
        return split
    return tensor[None]
