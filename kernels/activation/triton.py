"""The SwiGLU product. Shapes: as in reference.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.pass_memory import Memory

_BLOCK = 1024  # of bf16: 16 bytes a thread and load at 4 warps


@triton.jit
def silu_mul_fwd_kernel(p_gate_up, p_out, I, BLOCK: tl.constexpr):  # noqa: E741
    i_t = tl.program_id(0).to(tl.int64)
    i_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i_i < I
    b_gate = tl.load(p_gate_up + i_t * 2 * I + i_i, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + i_t * 2 * I + I + i_i, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * I + i_i, (b_gate * tl.sigmoid(b_gate) * b_up).to(p_out.dtype.element_ty), mask=mask)


def silu_mul(gate_up_TI2: Tensor, *, memory: Memory) -> Tensor:
    """See reference.py."""
    assert gate_up_TI2.is_contiguous()
    tokens, inner = gate_up_TI2.shape[0], gate_up_TI2.shape[1] // 2
    out_TI = memory.empty((tokens, inner), gate_up_TI2.dtype, gate_up_TI2.device)
    silu_mul_fwd_kernel[(tokens, triton.cdiv(inner, _BLOCK))](gate_up_TI2, out_TI, inner, BLOCK=_BLOCK)
    return out_TI
