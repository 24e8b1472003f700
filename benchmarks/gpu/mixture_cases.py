"""Inputs for what surrounds the routed experts: several calls each, compared as one operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from divisi.benchmarks.gpu.cases import Case, Draw, routed_experts
from divisi.kernels.select import Kernels


def mixture_inputs(draw: Draw, name: str, tokens: int, experts: int, chosen: int, width: int, inner: int) -> Case:
    """Whole numbers, whose products and sums (up to 256, in bf16) are exact, so that the choices are."""
    sizes = ((tokens, width), 1.0), ((experts, width), 0.5), ((width,), 0.5)
    x, router, gate = (draw.normal(*size, scale=scale).round() for size, scale in sizes)
    gate_up, down = draw.normal(2 * inner, width, scale=width**-0.5), draw.normal(width, inner, scale=inner**-0.5)
    moved = sum(w.nbytes for w in (router, gate, gate_up, down, x, x))
    arguments = x, router, gate, gate_up, down, chosen
    return Case("mixture_inputs", name, arguments, bytes=moved, several=_mixture_inputs)


def mixture_add_norm(
    draw: Draw, name: str, tokens: int, chosen: int, width: int, inner: int, experts: int, *, summed: bool = False
) -> Case:
    """After the experts of this process, or of others (``summed``)."""
    own = routed_experts(draw, name, tokens, chosen, experts, width, inner, elsewhere=1)
    routed = (draw.normal(tokens, width, dtype=torch.float32),) if summed else own.arguments
    residual, shared, logits = draw.normal(tokens, width), draw.normal(tokens, width), draw.normal(tokens, 3)
    scale = draw.normal(width, dtype=torch.float32)
    moved, made = 4 * residual.nbytes, 2 * residual.nbytes if summed else own.bytes - 4 * tokens * width
    return Case(
        "mixture_add_norm", name, (residual, shared, logits[:, 1], scale, 1e-6, *routed), written=(0,),
        bytes=moved + made, flops=0.0 if summed else own.flops, between=0.0 if summed else own.between,
        several=_mixture_add_norm,
    )  # fmt: skip


def _mixture_inputs(
    kernels: Kernels, x_TD: Tensor, router_ED: Tensor, gate_D: Tensor, gate_up_FD: Tensor, down_DI: Tensor, chosen: int
) -> tuple[Tensor, ...]:
    matrices = kernels.mixture.pack(router_ED, gate_D, gate_up_FD, down_DI)
    rows = kernels.mixture.inputs(x_TD, matrices, chosen, True)
    return rows.ids_TK, rows.gates_TK, rows.gate_T, kernels.mixture.shared(x_TD, rows, matrices)


def _mixture_add_norm(
    kernels: Kernels, residual_TD: Tensor, shared_TD: Tensor, gate_T: Tensor, scale_D: Tensor, eps: float,
    *routed: Any,
) -> Tensor:  # fmt: skip
    found = routed[0] if len(routed) == 1 else kernels.mixture.routed(*routed)
    update = kernels.mixture.combined(found, shared_TD, gate_T)
    return kernels.mixture.add_norm(residual_TD, update, scale_D, eps)
