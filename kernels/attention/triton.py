"""Gated attention over pages: one body for decode, which splits the context over programs, and prefill, which does not.

A block of queries holds rows of one run, each with all query heads of one key head or with one of them; it reads the
keys and values that any of its rows sees once. Shapes: as in reference.py; M queries of a block, N keys of one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.attention.layout import KvPool
from divisi.kernels.attention.reference import attend_runs
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.runs import block_of_run, run_of_row
from divisi.kernels.pass_memory import Memory

_SPLIT = 512  # keys of a decode program: 2 x 256 KB of bf16 at head dim 256, some 10 us of one SM's share of bandwidth
_MOST_SPLITS = 64  # beyond it splits grow, so that partial results stay below 1 MB a row
_ROW_BLOCK = 128
_MOST_DIM = 256  # a tile of wider heads does not fit in shared memory
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Tiles:
    block_m: int
    block_n: int
    warps: int
    stages: int


# decode, by the queries of a block: rows of a run x query heads of a key head. On an H100 three stages, 8 or 2 warps
# and 32 keys are slower for 16 queries; for 32 queries 64 keys spill
_DECODE = {
    Chip.A100: (_Tiles(16, 32, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(64, 32, 8, 2)),
    Chip.H100: (_Tiles(16, 64, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(64, 64, 8, 2)),
    Chip.B200: (_Tiles(16, 64, 4, 2), _Tiles(32, 32, 4, 2), _Tiles(64, 64, 8, 1)),
}
# prefill: 128 queries of 256 dims take 64 KB, K and V 64 KB a stage. On an H100 this tile spills 56 bytes and still is
# a quarter faster than those that do not (1,270 us for 8,192 rows; 32 keys 1,693; one stage 1,563)
_PREFILL = {Chip.A100: _Tiles(64, 32, 8, 2), Chip.H100: _Tiles(128, 64, 8, 2), Chip.B200: _Tiles(64, 64, 8, 1)}
# fp32 pools: exact products take no matrix unit and many registers; it is the dtype of tests, not of speed
_EXACT = _Tiles(16, 16, 4, 1)


@triton.jit
def _attend(
    b_q, b_max, b_sum, b_acc, p_key, p_value, p_pages, i_j, b_last, begin, end, scale,
    J: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from ``begin`` to ``end``.

    With MASKED query m sees those up to ``b_last[m]``; without, it sees all, and they are whole blocks.
    """
    i_d = tl.arange(0, BLOCK_D)
    for i_n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        i_key = i_n + tl.arange(0, BLOCK_N)
        held = (i_key < end) | (not MASKED)
        b_page = tl.load(p_pages + i_key // PAGE, mask=held, other=0).to(tl.int64)
        i_kv = ((b_page * PAGE + i_key % PAGE) * J + i_j) * D
        mask = held[:, None] & (i_d < D)[None, :]
        b_k = tl.load(p_key + i_kv[:, None] + i_d[None, :], mask=mask, other=0.0)
        b_v = tl.load(p_value + i_kv[:, None] + i_d[None, :], mask=mask, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if MASKED:
            b_s = tl.where(held[None, :] & (i_key[None, :] <= b_last[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_base = b_new
        if MASKED:
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # a query may see none of these keys
        b_p = tl.exp2(b_s - b_base[:, None])
        b_keep = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_acc = b_acc * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = b_new
    return b_max, b_sum, b_acc


@triton.jit(do_not_specialize=["pages_stride", "num_splits"])
def attention_split_fwd_kernel(
    p_q, p_key, p_value, p_starts, p_lengths, p_pages, p_part, p_part_max, p_part_sum,
    scale, pages_stride, num_splits,
    Q: tl.constexpr, J: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one run's keys for all its rows and the query heads of key head j; unnormalised results."""
    i_split, i_j, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = Q // J
    i_row = tl.load(p_starts + i_s)
    num_rows = tl.load(p_starts + i_s + 1) - i_row
    length = tl.load(p_lengths + i_s)
    begin = i_split * SPLIT
    end = tl.minimum(begin + SPLIT, length + num_rows)
    begin = tl.maximum(begin, FIRST)
    if begin < end:
        i_d = tl.arange(0, BLOCK_D)
        for i_m in range(0, num_rows * GROUP, BLOCK_M):
            i_q = i_m + tl.arange(0, BLOCK_M)
            held = i_q < num_rows * GROUP
            i_head = (i_row + i_q // GROUP).to(tl.int64) * Q + i_j * GROUP + i_q % GROUP
            mask = held[:, None] & (i_d < D)[None, :]
            b_q = tl.load(p_q + i_head[:, None] * D + i_d[None, :], mask=mask, other=0.0).to(p_key.dtype.element_ty)
            b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_M], tl.float32)
            b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            b_max, b_sum, b_acc = _attend(
                b_q, b_max, b_sum, b_acc, p_key, p_value, p_pages + i_s.to(tl.int64) * pages_stride, i_j,
                length + i_q // GROUP, begin, end, scale, J, D, PAGE, BLOCK_N, BLOCK_D, STAGES, PRECISION, True,
            )  # fmt: skip
            i_part = i_head * num_splits + i_split
            tl.store(p_part_max + i_part, b_max, mask=held)
            tl.store(p_part_sum + i_part, b_sum, mask=held)
            tl.store(p_part + i_part[:, None] * D + i_d[None, :], b_acc, mask=mask)


@triton.jit(do_not_specialize=["num_runs", "num_splits"])
def attention_join_fwd_kernel(
    p_part, p_part_max, p_part_sum, p_gate, p_out, p_starts, p_lengths, num_runs, num_splits, gate_stride,
    Q: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Join one head's splits in their order, and gate; zero for rows that no run owns."""
    i_t, i_q = tl.program_id(0), tl.program_id(1)
    i_d = tl.arange(0, BLOCK_D)
    i_s = run_of_row(p_starts, num_runs, i_t, BLOCK_S)
    i_head = i_t.to(tl.int64) * Q + i_q
    b_max = float("-inf")
    b_sum = 0.0
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    if i_s < num_runs:
        visible = tl.load(p_lengths + i_s) + i_t - tl.load(p_starts + i_s) + 1
        for i_split in range(tl.cdiv(visible, SPLIT)):
            i_part = i_head * num_splits + i_split
            part_max = tl.load(p_part_max + i_part)
            new = tl.maximum(b_max, part_max)
            keep, take = tl.exp2(b_max - new), tl.exp2(part_max - new)
            b_sum = b_sum * keep + tl.load(p_part_sum + i_part) * take
            b_acc = b_acc * keep + tl.load(p_part + i_part * D + i_d, mask=i_d < D, other=0.0) * take
            b_max = new
        b_gate = tl.load(p_gate + i_t.to(tl.int64) * gate_stride + i_q * D + i_d, mask=i_d < D, other=0.0)
        b_acc = b_acc / b_sum * tl.sigmoid(b_gate.to(tl.float32))
    tl.store(p_out + i_head * D + i_d, b_acc.to(p_out.dtype.element_ty), mask=i_d < D)


@triton.jit(do_not_specialize=["num_runs", "pages_stride"])
def attention_prefill_fwd_kernel(
    p_q, p_gate, p_key, p_value, p_starts, p_lengths, p_pages, p_out, scale, num_runs, gate_stride, pages_stride,
    Q: tl.constexpr, J: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of one run's rows with one query head, over all it sees."""
    i_q = tl.program_id(0)
    # later blocks see more keys, so they start first
    i_s, i_first = block_of_run(p_starts, num_runs, tl.num_programs(1) - 1 - tl.program_id(1), BLOCK_M)
    if i_s >= 0:
        i_row = tl.load(p_starts + i_s)
        num_rows = tl.load(p_starts + i_s + 1) - i_row
        length = tl.load(p_lengths + i_s)
        i_j = i_q // (Q // J)
        i_m = i_first + tl.arange(0, BLOCK_M)
        i_d = tl.arange(0, BLOCK_D)
        mask = (i_m < num_rows)[:, None] & (i_d < D)[None, :]
        i_head = (i_row + i_m).to(tl.int64) * Q + i_q
        b_q = tl.load(p_q + i_head[:, None] * D + i_d[None, :], mask=mask, other=0.0).to(p_key.dtype.element_ty)
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        end = length + tl.minimum(i_first + BLOCK_M, num_rows)
        p_table = p_pages + i_s.to(tl.int64) * pages_stride
        common = (length + i_first + 1) // BLOCK_N * BLOCK_N  # what the first row sees, all do
        b_max, b_sum, b_acc = _attend(
            b_q, b_max, b_sum, b_acc, p_key, p_value, p_table, i_j, length + i_m, 0, common, scale,
            J, D, PAGE, BLOCK_N, BLOCK_D, STAGES, PRECISION, False,
        )  # fmt: skip
        b_max, b_sum, b_acc = _attend(
            b_q, b_max, b_sum, b_acc, p_key, p_value, p_table, i_j, length + i_m, common, end, scale,
            J, D, PAGE, BLOCK_N, BLOCK_D, STAGES, PRECISION, True,
        )  # fmt: skip
        p_gates = p_gate + (i_row + i_m).to(tl.int64)[:, None] * gate_stride + i_q * D + i_d[None, :]
        b_gate = tl.load(p_gates, mask=mask, other=0.0).to(tl.float32)
        b_out = b_acc / b_sum[:, None] * tl.sigmoid(b_gate)
        tl.store(p_out + i_head[:, None] * D + i_d[None, :], b_out.to(p_out.dtype.element_ty), mask=mask)


def attention_decode(
    q_TQD: Tensor,
    rows_TP: Tensor,
    pool: KvPool,
    starts_S1: Tensor,
    lengths_S: Tensor,
    pages_SN: Tensor,
    first: int = 0,
    *,
    chip: Chip,
    memory: Memory,
) -> Tensor:
    """See ``attend_runs`` in reference.py. Rows past the last run's are padding: their output is zero."""
    if q_TQD.shape[2] > _MOST_DIM:
        return _by_reference(q_TQD, rows_TP, pool, starts_S1, lengths_S, pages_SN, first)
    assert first < _SPLIT, "every split has keys"
    (tokens, heads, dim), kv_heads, runs = q_TQD.shape, pool.key_PJD.shape[1], lengths_S.shape[0]
    most_keys = pages_SN.shape[1] * pool.page_size
    split = max(_SPLIT, triton.next_power_of_2(triton.cdiv(most_keys, _MOST_SPLITS)))
    splits = max(triton.cdiv(most_keys, split), 1)
    # how many rows a run has is known on the device only; blocks that are too small for them are looped over
    queries = triton.cdiv(tokens, max(runs, 1)) * (heads // kv_heads)
    fitting = next((tiles for tiles in _DECODE[chip] if tiles.block_m >= queries), _DECODE[chip][-1])
    # 8 warps share 64 queries two by two, and the half of a small head is less than a product takes
    fitting = fitting if dim >= 64 else _DECODE[chip][0]
    tiles = _EXACT if pool.key_PJD.dtype is torch.float32 else fitting
    part_TQZD = memory.empty((tokens, heads, splits, dim), torch.float32, q_TQD.device)
    part_max_TQZ = memory.empty((tokens, heads, splits), torch.float32, q_TQD.device)
    part_sum_TQZ = memory.empty((tokens, heads, splits), torch.float32, q_TQD.device)
    out_TX = memory.empty((tokens, heads * dim), q_TQD.dtype, q_TQD.device)
    block_d = max(triton.next_power_of_2(dim), 16)
    attention_split_fwd_kernel[(splits, kv_heads, runs)](
        q_TQD, pool.key_PJD, pool.value_PJD, starts_S1, lengths_S, pages_SN, part_TQZD, part_max_TQZ, part_sum_TQZ,
        _scale(dim), pages_SN.stride(0), splits, Q=heads, J=kv_heads, D=dim, PAGE=pool.page_size, SPLIT=split,
        FIRST=first, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d, STAGES=tiles.stages,
        PRECISION=_precision(pool), num_warps=tiles.warps,
    )  # fmt: skip
    gate_TX = rows_TP[:, heads * dim :]
    attention_join_fwd_kernel[(tokens, heads)](
        part_TQZD, part_max_TQZ, part_sum_TQZ, gate_TX, out_TX, starts_S1, lengths_S, runs, splits, gate_TX.stride(0),
        Q=heads, D=dim, SPLIT=split, BLOCK_D=block_d, BLOCK_S=_ROW_BLOCK, num_warps=1,
    )  # fmt: skip
    return out_TX


def attention_prefill(
    q_TQD: Tensor, rows_TP: Tensor, pool: KvPool, starts_S1: Tensor, lengths_S: Tensor, pages_SN: Tensor, *, chip: Chip
) -> Tensor:
    """See ``attend_runs`` in reference.py."""
    if q_TQD.shape[2] > _MOST_DIM:
        return _by_reference(q_TQD, rows_TP, pool, starts_S1, lengths_S, pages_SN)
    (tokens, heads, dim), runs = q_TQD.shape, lengths_S.shape[0]
    tiles = _EXACT if pool.key_PJD.dtype is torch.float32 else _PREFILL[chip]
    out_TX = torch.empty((tokens, heads * dim), dtype=q_TQD.dtype, device=q_TQD.device)
    gate_TX = rows_TP[:, heads * dim :]
    attention_prefill_fwd_kernel[(heads, tokens // tiles.block_m + runs)](
        q_TQD, gate_TX, pool.key_PJD, pool.value_PJD, starts_S1, lengths_S, pages_SN, out_TX,
        _scale(dim), runs, gate_TX.stride(0), pages_SN.stride(0),
        Q=heads, J=pool.key_PJD.shape[1], D=dim, PAGE=pool.page_size, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_D=max(triton.next_power_of_2(dim), 16), STAGES=tiles.stages, PRECISION=_precision(pool),
        num_warps=tiles.warps,
    )  # fmt: skip
    return out_TX


def _by_reference(q_TQD: Tensor, *arguments: Any) -> Tensor:
    _tell_once(q_TQD.shape[2])
    return attend_runs(q_TQD, *arguments)


@cache
def _tell_once(dim: int) -> None:
    _log.warning("heads of %d dims have no Triton attention (at most %d): the reference runs", dim, _MOST_DIM)


def _scale(dim: int) -> float:
    """For exp2: it is one instruction, exp is two."""
    return float(dim**-0.5 * 1.4426950408889634)


def _precision(pool: KvPool) -> str:
    return "ieee" if pool.key_PJD.dtype is torch.float32 else "tf32"
