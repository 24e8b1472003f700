"""Choosing each token's experts, one token a program: softmax, a stable choice of the K largest, their sum.

A logit and its expert's number are packed into one int64 that sorts by logit first and by the lower number second, so
that equal logits are told apart as the reference does. Shapes: as in reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.pass_memory import Memory


@triton.jit
def route_row(
    p_logits, p_ids, p_gates, i_t, row_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Store the choices of row ``i_t`` (int64) and their gates."""
    i_e = tl.arange(0, BLOCK_E)
    i_k = tl.arange(0, BLOCK_K)
    b_logit = tl.load(p_logits + i_t * row_stride + i_e, mask=i_e < E, other=float("-inf")).to(tl.float32)
    best = tl.max(b_logit, 0)
    total = tl.sum(tl.exp(b_logit - best), 0)
    b_bits = (b_logit + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)  # as integers they sort like the floats
    b_key = (b_order.to(tl.int64) << 32) + (BLOCK_E - 1 - i_e)
    b_key = tl.where(i_e < E, b_key, -(2**63))
    b_ids = tl.zeros([BLOCK_K], tl.int32)
    b_gates = tl.zeros([BLOCK_K], tl.float32)
    for k in range(K):
        top = tl.max(b_key, 0)
        e = BLOCK_E - 1 - (top & 0xFFFFFFFF).to(tl.int32)
        bits = (top >> 32).to(tl.int32)
        logit = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
        b_ids = tl.where(i_k == k, e, b_ids)
        b_gates = tl.where(i_k == k, tl.exp(logit - best) / total, b_gates)
        b_key = tl.where(i_e == e, -(2**63), b_key)
    if NORMALISE:
        b_gates = b_gates / tl.sum(b_gates, 0)
    tl.store(p_ids + i_t * K + i_k, b_ids, mask=i_k < K)
    tl.store(p_gates + i_t * K + i_k, b_gates, mask=i_k < K)


@triton.jit
def route_fwd_kernel(
    p_logits, p_ids, p_gates, row_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    route_row(p_logits, p_ids, p_gates, i_t, row_stride, E, BLOCK_E, K, BLOCK_K, NORMALISE)


def route(logits_TE: Tensor, num_chosen: int, normalise: bool, *, memory: Memory) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    assert logits_TE.stride(1) == 1
    tokens, experts = logits_TE.shape
    ids_TK = memory.empty((tokens, num_chosen), torch.int32, logits_TE.device)
    gates_TK = memory.empty((tokens, num_chosen), torch.float32, logits_TE.device)
    block = triton.next_power_of_2(experts)
    route_fwd_kernel[(tokens,)](
        logits_TE, ids_TK, gates_TK, logits_TE.stride(0), E=experts, BLOCK_E=block, K=num_chosen,
        BLOCK_K=triton.next_power_of_2(num_chosen), NORMALISE=normalise,
        num_warps=warps_of_choice(block),
    )  # fmt: skip
    return ids_TK, gates_TK


def warps_of_choice(block: int) -> int:
    """One warp: its reductions need no barrier, and there is one for every expert chosen."""
    return 1 if block <= 1024 else 4
