"""The operations that have a Triton kernel, with a chip's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from divisi.kernels.activation.triton import silu_mul
from divisi.kernels.attention.triton import attention_decode, attention_prefill
from divisi.kernels.attention.triton_inputs import attention_inputs
from divisi.kernels.experts.triton import routed_experts
from divisi.kernels.gated_delta.triton_decode import gated_delta_decode, gated_delta_flush
from divisi.kernels.gated_delta.triton_prefill import gated_delta_prefill
from divisi.kernels.gpu.cache import use_built
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.linear.layout import Matrix, StoredMatrix
from divisi.kernels.linear.triton import embed, linear
from divisi.kernels.mixture.triton import FusedMixture
from divisi.kernels.norm.triton import add_rms_norm, rms_norm
from divisi.kernels.pass_memory import Buffers, Memory
from divisi.kernels.router.triton import route
from divisi.kernels.sampling.triton import choose_tokens


def triton_operations(chip: Chip) -> Mapping[str, Any]:
    """By name, with the memory that they share. Matrix products are torch's, which are the vendor's own."""
    use_built()
    memory = Buffers()
    alike = (linear, embed, silu_mul, attention_inputs, add_rms_norm, rms_norm, route, choose_tokens)
    configured = (attention_decode, routed_experts, gated_delta_decode)
    unbuffered = (attention_prefill, gated_delta_prefill, gated_delta_flush)  # no part of a pass of decoding rows
    table: dict[str, Any] = {op.__name__: partial(op, memory=memory) for op in alike}
    table |= {op.__name__: partial(op, chip=chip, memory=memory) for op in configured}
    table |= {op.__name__: partial(op, chip=chip) for op in unbuffered}
    table |= {"pack_linear": StoredMatrix, "pack_experts": _stored, "pack_mlp": _stored}
    table |= {"mlp": partial(_mlp, memory=memory), "memory": memory, "mixture": FusedMixture(chip, memory)}
    table["takes_padding"] = True
    return table


def _stored(*weights: Tensor) -> tuple[StoredMatrix, ...]:
    return tuple(map(StoredMatrix, weights))


def _mlp(x_TD: Tensor, gate_up_FD: Matrix, down_DI: Matrix, *, memory: Memory) -> Tensor:
    inner_TI = silu_mul(linear(x_TD, gate_up_FD, memory=memory), memory=memory)
    return linear(inner_TI, down_DI, memory=memory)
