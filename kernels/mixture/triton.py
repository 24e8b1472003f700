"""A mixture in as few launches as there are things to wait for, with the router and the shared expert in one product.

A row of the product is ``[gate I | up I | logits E | shared gate | zeros]``; it begins at whole 16 bytes, which the
vendor's products and 16-byte loads want. Shapes: as in layout.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.experts.layout import Tree
from divisi.kernels.experts.triton import expert_parts
from divisi.kernels.experts.triton_sum import parts_of_row
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.linear.layout import Matrix, StoredMatrix, plain_rows
from divisi.kernels.linear.triton import linear
from divisi.kernels.mixture.layout import (
    ExpertParts,
    MixtureMatrices,
    MixtureRows,
    MixtureUpdate,
    Routed,
    Update,
)
from divisi.kernels.norm.triton import add_rms_norm, warps_of_row
from divisi.kernels.pass_memory import Memory
from divisi.kernels.router.triton import route_row, warps_of_choice

_ALIGNED = 16  # rows: 32 bytes of bf16
_COLUMNS = 2048  # of a norm at a time, 8 a thread: on an H100 12 us for 64 rows, 1,024 take 15 to 19, 512 27 to 32
_BLOCK_I = 512  # inner values of a program of one warp: 16 a thread


@triton.jit(do_not_specialize=["num_runs"])
def mixture_inputs_fwd_kernel(
    p_rows, p_ids, p_gates, p_inner, p_starts, num_runs, row_stride,
    E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, NORMALISE: tl.constexpr,
    I: tl.constexpr, BLOCK_I: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Of a row, the first program chooses experts, the others apply the shared expert's SwiGLU."""
    i_t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        owned = True
        if p_starts is not None:
            owned = i_t < tl.load(p_starts + num_runs)
        if owned:
            route_row(p_rows + 2 * I, p_ids, p_gates, i_t, row_stride, E, BLOCK_E, K, BLOCK_K, NORMALISE)
        else:
            i_k = tl.arange(0, BLOCK_K)
            tl.store(p_ids + i_t * K + i_k, tl.full([BLOCK_K], -1, tl.int32), mask=i_k < K)
    else:
        i_i = (tl.program_id(1) - 1) * BLOCK_I + tl.arange(0, BLOCK_I)
        p_gate = p_rows + i_t * row_stride + i_i
        b_gate = tl.load(p_gate, mask=i_i < I, other=0.0).to(tl.float32)
        b_up = tl.load(p_gate + I, mask=i_i < I, other=0.0).to(tl.float32)
        b_inner = b_gate * tl.sigmoid(b_gate) * b_up
        tl.store(p_inner + i_t * I + i_i, b_inner.to(p_inner.dtype.element_ty), mask=i_i < I)


@triton.jit
def mixture_norm_fwd_kernel(
    p_x, p_routed, p_ids, p_expert_gates, p_leaves, p_shared, p_gate, p_scale, p_out, gate_stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHOICES: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """A row's residual with all that the mixture adds, and its norm. CHOICES is 0 where the experts are summed.

    Some columns at a time, since sums that wait take registers; what is kept is what is normalised.
    """
    i_t = tl.program_id(0).to(tl.int64)
    gate = tl.sigmoid(tl.load(p_gate + i_t * gate_stride).to(tl.float32))
    b_squares = tl.zeros([BLOCK_D], tl.float32)
    for i in range(0, D, BLOCK_D):
        i_d = i + tl.arange(0, BLOCK_D)
        mask = i_d < D
        if CHOICES == 0:
            b_routed = tl.load(p_routed + i_t * D + i_d, mask=mask, other=0.0)
        else:
            b_routed = parts_of_row(
                p_routed, p_ids, p_expert_gates, p_leaves, i_t, i_d, D, CHOICES, BLOCK_K, LEVELS, BLOCK_D
            )
        b_shared = tl.load(p_shared + i_t * D + i_d, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + i_t * D + i_d, mask=mask, other=0.0).to(tl.float32)
        b_sum = (b_x + (b_routed + gate * b_shared)).to(p_x.dtype.element_ty)
        tl.store(p_x + i_t * D + i_d, b_sum, mask=mask)
        b_squares += b_sum.to(tl.float32) * b_sum.to(tl.float32)
    factor = tl.rsqrt(tl.sum(b_squares, 0) / D + eps)
    tl.debug_barrier()  # another thread may read a column than stored it
    for i in range(0, D, BLOCK_D):
        i_d = i + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_t * D + i_d, mask=i_d < D, other=0.0).to(tl.float32)
        b_out = b_x * factor * tl.load(p_scale + i_d, mask=i_d < D, other=0.0)
        tl.store(p_out + i_t * D + i_d, b_out.to(p_out.dtype.element_ty), mask=i_d < D)


class FusedMixture:
    """Implements `MixtureKernels`. Rounds once where the operations one by one do after each."""

    def __init__(self, chip: Chip, memory: Memory) -> None:
        self._chip, self._memory = chip, memory

    def pack(self, router_ED: Tensor, gate_D: Tensor, gate_up_FD: Tensor, down_DI: Tensor) -> MixtureMatrices:
        """See MixtureKernels."""
        rows = [gate_up_FD, router_ED, gate_D[None]]
        count = sum(map(len, rows))
        zeros = gate_D.new_zeros((-count % _ALIGNED, len(gate_D)))
        return MixtureMatrices(StoredMatrix(torch.cat([*rows, zeros])), None, StoredMatrix(down_DI), len(router_ED))

    def inputs(
        self, x_TD: Tensor, matrices: MixtureMatrices, num_chosen: int, normalise: bool, starts_S1: Tensor | None = None
    ) -> MixtureRows:
        """See MixtureKernels."""
        rows_TN = linear(x_TD, matrices.inputs_ND, memory=self._memory)
        tokens, device, experts = x_TD.shape[0], x_TD.device, matrices.experts
        inner = plain_rows(matrices.shared_down_DI).shape[1]
        ids_TK = self._memory.empty((tokens, num_chosen), torch.int32, device)
        gates_TK = self._memory.empty((tokens, num_chosen), torch.float32, device)
        inner_TI = self._memory.empty((tokens, inner), rows_TN.dtype, device)
        block = triton.next_power_of_2(experts)
        mixture_inputs_fwd_kernel[(tokens, 1 + triton.cdiv(inner, _BLOCK_I))](
            rows_TN, ids_TK, gates_TK, inner_TI, starts_S1, 0 if starts_S1 is None else starts_S1.shape[0] - 1,
            rows_TN.stride(0), E=experts, BLOCK_E=block, K=num_chosen,
            BLOCK_K=triton.next_power_of_2(num_chosen), NORMALISE=normalise, I=inner, BLOCK_I=_BLOCK_I,
            num_warps=warps_of_choice(block),
        )  # fmt: skip
        return MixtureRows(ids_TK, gates_TK, rows_TN[:, 2 * inner + experts], inner_TI)

    def shared(self, x_TD: Tensor, rows: MixtureRows, matrices: MixtureMatrices) -> Tensor:
        """See MixtureKernels."""
        assert rows.inner_TI is not None, "made here"
        return linear(rows.inner_TI, matrices.shared_down_DI, memory=self._memory)

    def routed(
        self, x_TD: Tensor, local_ids_TK: Tensor, gates_TK: Tensor, tree: Tree, gate_up_EFD: Matrix, down_EDI: Matrix
    ) -> Routed:
        """See MixtureKernels."""
        weights = gate_up_EFD, down_EDI
        return expert_parts(x_TD, local_ids_TK, gates_TK, tree, *weights, chip=self._chip, memory=self._memory)

    def combined(self, routed: Routed, shared_TD: Tensor, gate_T: Tensor) -> MixtureUpdate:
        """See MixtureKernels."""
        return MixtureUpdate(routed, shared_TD, gate_T)

    def add_norm(self, residual_TD: Tensor, update: Update, scale_D: Tensor, eps: float) -> Tensor:
        """See MixtureKernels."""
        if not isinstance(update, MixtureUpdate):
            return add_rms_norm(residual_TD, update, scale_D, eps, memory=self._memory)
        assert residual_TD.is_contiguous()
        assert update.shared_TD.is_contiguous()
        routed, (tokens, width) = update.routed, residual_TD.shape
        sources: tuple[Tensor | None, ...]
        if isinstance(routed, ExpertParts):
            sources = routed.parts_PD, routed.ids_TK, routed.gates_TK, routed.tree.leaves_E
            choices, leaves = routed.ids_TK.shape[1], routed.tree.size
        else:
            sources, choices, leaves = (routed, None, None, None), 0, 1
        out_TD = self._memory.empty(residual_TD.shape, residual_TD.dtype, residual_TD.device)
        block = min(triton.next_power_of_2(width), _COLUMNS)
        mixture_norm_fwd_kernel[(tokens,)](
            residual_TD, *sources, update.shared_TD, update.gate_T, scale_D, out_TD, update.gate_T.stride(0), eps,
            D=width, BLOCK_D=block, CHOICES=choices, BLOCK_K=triton.next_power_of_2(max(choices, 1)),
            LEVELS=leaves.bit_length() - 1, num_warps=warps_of_row(block),
        )  # fmt: skip
        return out_TD
