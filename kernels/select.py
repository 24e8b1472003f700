"""Which implementation of each operation a device gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.kernels.activation.reference import silu_mul
from divisi.kernels.attention import reference as attention
from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.choice import OPERATIONS, KernelChoice
from divisi.kernels.experts.layout import Tree
from divisi.kernels.experts.reference import add_shared, routed_experts
from divisi.kernels.gated_delta import reference as gated_delta
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves
from divisi.kernels.linear.layout import Matrix
from divisi.kernels.linear.reference import embed, linear
from divisi.kernels.mixture.reference import ComposedMixture, MixtureKernels
from divisi.kernels.mlp.reference import mlp
from divisi.kernels.native.fused import Fused
from divisi.kernels.native.loader import load_library
from divisi.kernels.native.ops import native_operations
from divisi.kernels.native.variants import VARIANTS
from divisi.kernels.norm.reference import add_rms_norm, rms_norm
from divisi.kernels.pass_memory import Memory, TorchMemory
from divisi.kernels.router.reference import route
from divisi.kernels.sampling.layout import Draws
from divisi.kernels.sampling.reference import choose_tokens


class Kernels(Protocol):
    """The operations a model needs; each is specified by its reference."""

    fused: Fused | None
    """Several of them as one, where all are the same implementation's and it has them."""
    takes_padding: bool
    """Whether decode steps may have sequences of slot -1 without rows, and rows that no sequence owns."""

    def pack_linear(self, weight_NK: Tensor) -> Matrix: ...
    def pack_experts(self, gate_up_EFD: Tensor, down_EDI: Tensor) -> tuple[Matrix, Matrix]: ...
    def pack_mlp(self, gate_up_FD: Tensor, down_DI: Tensor) -> tuple[Matrix, Matrix]: ...
    def linear(self, x_TK: Tensor, weight_NK: Matrix) -> Tensor: ...
    def embed(self, weight_NK: Matrix, rows_T: Tensor) -> Tensor: ...
    def mlp(self, x_TD: Tensor, gate_up_FD: Matrix, down_DI: Matrix) -> Tensor: ...
    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor: ...
    def silu_mul(self, gate_up_TI2: Tensor) -> Tensor: ...
    def route(self, logits_TE: Tensor, num_chosen: int, normalise: bool) -> tuple[Tensor, Tensor]: ...
    def routed_experts(
        self,
        x_TD: Tensor,
        local_ids_TK: Tensor,
        gates_TK: Tensor,
        tree: Tree,
        gate_up_EFD: Matrix,
        down_EDI: Matrix,
    ) -> Tensor: ...
    def add_shared(self, routed_TD: Tensor, shared_TD: Tensor, logits_T: Tensor) -> Tensor: ...
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
        self,
        q_TQD: Tensor,
        rows_TP: Tensor,
        pool: KvPool,
        starts_S1: Tensor,
        lengths_S: Tensor,
        pages_SN: Tensor,
        first: int = 0,
    ) -> Tensor: ...
    def attention_prefill(
        self, q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor
    ) -> Tensor: ...
    def choose_tokens(self, logits_RV: Tensor, draws: Draws, positions_R: NDArray[np.int64]) -> Tensor: ...
    @property
    def mixture(self) -> MixtureKernels: ...
    @property
    def memory(self) -> Memory: ...


_REFERENCE: Mapping[str, Callable[..., Any]] = {
    "pack_linear": lambda weight_NK: weight_NK,
    "pack_experts": lambda gate_up_EFD, down_EDI: (gate_up_EFD, down_EDI),
    "pack_mlp": lambda gate_up_FD, down_DI: (gate_up_FD, down_DI),
    "linear": linear,
    "embed": embed,
    "mlp": mlp,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "silu_mul": silu_mul,
    "route": route,
    "routed_experts": routed_experts,
    "add_shared": add_shared,
    "gated_delta_decode": gated_delta.gated_delta_decode,
    "gated_delta_prefill": gated_delta.gated_delta_prefill,
    "gated_delta_flush": gated_delta.gated_delta_flush,
    "attention_inputs": attention.attention_inputs,
    "attention_decode": attention.attend_runs,
    "attention_prefill": attention.attend_runs,
    "choose_tokens": choose_tokens,
}

_COMPANIONS = {"pack_linear": "linear", "embed": "linear", "pack_experts": "routed_experts", "pack_mlp": "mlp"}
"""What comes with the implementation of an operation: laying out its weights while they are loaded, reading rows."""
_OF_A_MIXTURE = {"linear", "mlp", "silu_mul", "route", "routed_experts", "add_shared", "add_rms_norm"}


def select_kernels(device: torch.device, choice: str = "auto", *, deterministic: bool = False) -> Kernels:
    """Kernels for ``device``, chosen operation by operation. Uses torch's number of threads.

    ``choice`` is ``auto``, ``reference``, ``native`` (C++, CPU), one of its builds or ``triton`` (GPU), and after it,
    or alone, exceptions by operation, separated by commas: ``auto,route=reference``. What an implementation leaves
    out is done by its reference. ``deterministic``: a row's result depends on its sequence alone, see
    native_operations. Raises ValueError for unknown names and for what the device cannot have.
    """
    told = KernelChoice.parse(choice)
    general, exceptions = told.general, told.exceptions
    if deterministic and (exceptions or general not in ("auto", "native", *VARIANTS) or not _has_native(device)):
        raise ValueError(
            f"deterministic is on, but kernels {choice!r} on device {device.type!r} are not: it needs the C++ "
            "kernels, which g++ builds for a CPU; install g++ and use device 'cpu', or turn deterministic off"
        )
    tables: dict[str, Mapping[str, Any]] = {}
    for name in told.implementations:
        tables[name] = _table(name, device, deterministic)
    if deterministic and (missing := [op for op in OPERATIONS if op not in tables[general]]):
        raise ValueError(f"deterministic is on, and {', '.join(missing)} has no such kernel; turn deterministic off")
    for op, name in exceptions.items():
        if name not in ("auto", "reference") and op not in tables[name]:
            raise ValueError(f"kernels '{op}={name}': there is no such implementation; use '{op}=reference'")
    return assembled(tables, general, exceptions)


def assembled(tables: Mapping[str, Mapping[str, Any]], general: str, exceptions: Mapping[str, str] = {}) -> Kernels:
    """Kernels of one table, with exceptions; what it leaves out is done by the references.

    A table's own ``mixture`` is taken where nothing that it stands for is an exception.
    """
    chosen = {op: tables[exceptions.get(op, general)].get(op, _REFERENCE[op]) for op in OPERATIONS}
    for companion, op in _COMPANIONS.items():
        chosen[companion] = tables[exceptions.get(op, general)].get(companion, _REFERENCE[companion])
    fused = None if exceptions else tables[general].get("fused")
    memory = tables[general].get("memory") or TorchMemory()
    takes_padding = not exceptions and tables[general].get("takes_padding", False)
    kernels = SimpleNamespace(**chosen, fused=fused, memory=memory, takes_padding=takes_padding)
    own = None if exceptions.keys() & _OF_A_MIXTURE else tables[exceptions.get("mixture", general)].get("mixture")
    kernels.mixture = own or ComposedMixture(cast(Kernels, kernels))
    return cast(Kernels, kernels)


def _has_native(device: torch.device) -> bool:
    return device.type == "cpu" and load_library() is not None


def _table(name: str, device: torch.device, deterministic: bool) -> Mapping[str, Any]:
    """What an implementation offers on the device."""
    if name in ("native", *VARIANTS) or (name == "auto" and device.type == "cpu"):
        library = (load_library(name) if name in VARIANTS else load_library()) if device.type == "cpu" else None
        if library is not None:
            return native_operations(library, deterministic)
        if name != "auto":
            raise ValueError(f"kernels {name!r} need a CPU device and a C++ compiler (g++); use 'auto' or 'reference'")
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        table = _triton_table(device)
        if table is not None:
            return table
        if name == "triton":
            raise ValueError("kernels 'triton' need an NVIDIA A100, H100, B200 or alike; use 'auto' or 'reference'")
    return _REFERENCE


def _triton_table(device: torch.device) -> Mapping[str, Any] | None:
    if device.type != "cuda":
        return None
    # imported here alone: compiling for a GPU is no business of a machine without one
    from divisi.kernels.gpu.chip import Chip
    from divisi.kernels.gpu.ops import triton_operations

    chip = Chip.of(device)
    return None if chip is None else triton_operations(chip)
