"""Which implementation of each operation a device gets."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from divisi.kernels.activation.reference import silu_mul
from divisi.kernels.attention import reference as attention
from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.experts.reference import routed_experts
from divisi.kernels.gated_delta import reference as gated_delta
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves
from divisi.kernels.linear.reference import linear
from divisi.kernels.native.loader import load_library
from divisi.kernels.native.ops import NativeKernels
from divisi.kernels.norm.reference import add_rms_norm, rms_norm
from divisi.kernels.router.reference import route


class Kernels(Protocol):
    """The operations a model needs; each is specified by its reference."""

    def linear(self, x_TK: Tensor, weight_NK: Tensor) -> Tensor: ...
    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor: ...
    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor: ...
    def route(self, logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]: ...
    def routed_experts(
        self, x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor
    ) -> Tensor: ...
    def gated_delta_decode(
        self,
        rows_TP: Tensor,
        weights: DeltaWeights,
        state: DeltaState,
        starts_S1: Tensor,
        lengths_S: Tensor,
        slots_S: Tensor,
    ) -> Tensor: ...
    def gated_delta_prefill(
        self,
        rows_TP: Tensor,
        weights: DeltaWeights,
        state: DeltaState,
        starts_S1: Tensor,
        lengths_S: Tensor,
        sources_S: Tensor,
        leaves: Leaves,
    ) -> Tensor: ...
    def gated_delta_flush(self, state: DeltaState, slots_N: Tensor, upto_N: Tensor) -> None: ...
    def attention_inputs(
        self, rows_TP: Tensor, cos_sin_TR: Tensor, norm: QkNorm, pool: KvPool, kv_rows_T: Tensor, num_heads: int
    ) -> Tensor: ...
    def attention_decode(
        self, q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor
    ) -> Tensor: ...
    def attention_prefill(
        self, q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor
    ) -> Tensor: ...


class ReferenceKernels:
    """Plain PyTorch, on any device."""

    linear = staticmethod(linear)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_mul = staticmethod(silu_mul)
    route = staticmethod(route)
    routed_experts = staticmethod(routed_experts)
    gated_delta_decode = staticmethod(gated_delta.gated_delta_decode)
    gated_delta_prefill = staticmethod(gated_delta.gated_delta_prefill)
    gated_delta_flush = staticmethod(gated_delta.gated_delta_flush)
    attention_inputs = staticmethod(attention.attention_inputs)
    attention_decode = staticmethod(attention.attend_runs)
    attention_prefill = staticmethod(attention.attend_runs)


Implementation = Literal["auto", "reference", "native"]


def select_kernels(
    device: torch.device, implementation: Implementation = "auto", *, deterministic: bool = False
) -> Kernels:
    """Kernels for ``device``: C++ on a CPU that can build it, else the references. Uses torch's number of threads.

    ``deterministic``: a row's result depends on its sequence alone, see NativeKernels. Raises ValueError when this, or
    ``native``, is asked for and cannot be had.
    """
    if implementation != "reference" and device.type == "cpu":
        library = load_library()
        if library is not None:
            return NativeKernels(library, deterministic)
    if deterministic:
        raise ValueError(
            f"deterministic is on, but kernels {implementation!r} on device {device.type!r} are not: it needs the C++ "
            "kernels, which g++ builds for a CPU; install g++ and use device 'cpu', or turn deterministic off"
        )
    if implementation == "native":
        raise ValueError("kernels 'native' need a CPU device and a C++ compiler (g++); use 'auto' or 'reference'")
    return ReferenceKernels()
