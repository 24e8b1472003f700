"""The operations that have a Triton kernel, with a chip's configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from divisi.kernels.activation.triton import silu_mul
from divisi.kernels.attention.triton import attention_decode, attention_prefill
from divisi.kernels.attention.triton_inputs import attention_inputs
from divisi.kernels.experts.triton import routed_experts
from divisi.kernels.gated_delta.triton_decode import gated_delta_decode, gated_delta_flush
from divisi.kernels.gated_delta.triton_prefill import gated_delta_prefill
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.linear.reference import linear
from divisi.kernels.norm.triton import add_rms_norm, rms_norm
from divisi.kernels.router.triton import route


def triton_operations(chip: Chip) -> Mapping[str, Callable[..., Any]]:
    """By name. Matrix products are left out: torch's are the vendor's own."""
    alike = (silu_mul, attention_inputs, add_rms_norm, rms_norm, route)
    configured = (
        attention_decode, attention_prefill, routed_experts, gated_delta_decode, gated_delta_prefill, gated_delta_flush
    )  # fmt: skip
    table: dict[str, Callable[..., Any]] = {op.__name__: op for op in alike}
    table["mlp"] = lambda x_TD, gate_up_FD, down_DI: linear(silu_mul(linear(x_TD, gate_up_FD)), down_DI)
    return table | {op.__name__: partial(op, chip=chip) for op in configured}
