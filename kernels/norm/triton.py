"""RMS norm, with the residual's sum in front of it, one row a program. Shapes: as in reference.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.pass_memory import Memory


@triton.jit
def rms_norm_fwd_kernel(
    p_x, p_update, p_scale, p_out, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64) * D
    i_d = tl.arange(0, BLOCK_D)
    mask = i_d < D
    b_x = tl.load(p_x + i_row + i_d, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        b_update = tl.load(p_update + i_row + i_d, mask=mask, other=0.0).to(tl.float32)
        b_sum = (b_x + b_update).to(p_x.dtype.element_ty)  # what the residual keeps is what is normalised
        tl.store(p_x + i_row + i_d, b_sum, mask=mask)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.load(p_scale + i_d, mask=mask, other=0.0)
    b_out = b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps) * b_scale
    tl.store(p_out + i_row + i_d, b_out.to(p_out.dtype.element_ty), mask=mask)


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float, *, memory: Memory) -> Tensor:
    """See reference.py."""
    return _launch(x_TD, None, scale_D, eps, memory)


def add_rms_norm(
    residual_TD: Tensor, update_TD: Tensor, scale_D: Tensor, eps: float, *, memory: Memory
) -> Tensor:
    """See reference.py."""
    assert update_TD.is_contiguous()
    return _launch(residual_TD, update_TD, scale_D, eps, memory)


def _launch(x_TD: Tensor, update_TD: Tensor | None, scale_D: Tensor, eps: float, memory: Memory) -> Tensor:
    assert x_TD.is_contiguous()
    tokens, width = x_TD.shape
    out_TD = memory.empty(x_TD.shape, x_TD.dtype, x_TD.device)
    block = triton.next_power_of_2(width)
    rms_norm_fwd_kernel[(tokens,)](
        x_TD, update_TD, scale_D, out_TD, eps, D=width, BLOCK_D=block, ADD=update_TD is not None,
        num_warps=warps_of_row(block),
    )  # fmt: skip
    return out_TD


def warps_of_row(block: int) -> int:
    """8 values a thread: one 16-byte load of bf16."""
    return min(max(block // 256, 1), 16)
