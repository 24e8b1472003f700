"""Sorting (token, choice) pairs by expert, stably, and cutting each expert's pairs into tiles; all on the device.

Shapes: as in reference.py; P pairs (T K), B blocks of pairs, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from divisi.kernels.pass_memory import Memory

_BLOCKS = (128, 1024)  # pairs sorted in registers, 1 or 8 a thread; the larger takes 10 us, too long for small batches
_ROWS = 8  # blocks' counts that are summed at once


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The tiles are ``count`` at most; those past the last have expert -1."""

    order_P: Tensor
    """int32: the pairs of expert 0, then those of expert 1, and so on; those of no expert are left out."""
    tile_3N: Tensor
    """int32: each tile's expert, its first place in ``order_P``, and where its expert's places end."""
    count: int


@triton.jit(do_not_specialize=["num_pairs"])
def experts_count_fwd_kernel(p_ids, p_counts, num_pairs, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """How many pairs of a block chose each expert."""
    i_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_id = tl.load(p_ids + i_p, mask=i_p < num_pairs, other=-1)
    b_count = tl.histogram(tl.maximum(b_id, 0), BLOCK_E, mask=b_id >= 0)
    tl.store(p_counts + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), b_count)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def experts_place_fwd_kernel(
    p_ids, p_counts, p_order, p_tile_expert, p_tile_first, p_tile_end, num_pairs, num_tiles,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """A block's pairs, sorted, to their places; the first program writes the tiles too. ALONE: there is one block."""
    i_b, num_blocks = tl.program_id(0), tl.num_programs(0)
    i_e, i_i = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK)
    i_p = i_b * BLOCK + i_i
    b_id = tl.load(p_ids + i_p, mask=i_p < num_pairs, other=-1)
    b_own = tl.histogram(tl.maximum(b_id, 0), BLOCK_E, mask=b_id >= 0)
    b_before = tl.zeros([BLOCK_E], tl.int32)
    b_total = b_own
    if not ALONE:
        b_total = tl.zeros([BLOCK_E], tl.int32)
        for i in range(0, num_blocks, ROWS):
            i_row = i + tl.arange(0, ROWS)
            p_count = p_counts + i_row[:, None] * BLOCK_E + i_e[None, :]
            b_count = tl.load(p_count, mask=(i_row < num_blocks)[:, None], other=0)
            b_total += tl.sum(b_count, 0)
            b_before += tl.sum(tl.where((i_row < i_b)[:, None], b_count, 0), 0)
    b_first = tl.cumsum(b_total, 0) - b_total
    # by expert and then by place within the block; those of no expert go last
    b_key = tl.sort(tl.where(b_id >= 0, b_id, BLOCK_E) * BLOCK + i_i)
    b_expert = b_key // BLOCK
    b_to = tl.gather(b_first + b_before - (tl.cumsum(b_own, 0) - b_own), tl.minimum(b_expert, BLOCK_E - 1), 0) + i_i
    tl.store(p_order + b_to, i_b * BLOCK + b_key % BLOCK, mask=b_expert < BLOCK_E)
    if i_b == 0:
        b_tiles = tl.cdiv(b_total, PAIRS)
        b_tile = tl.cumsum(b_tiles, 0) - b_tiles
        for i in range(tl.max(b_tiles, 0)):
            mask = i < b_tiles
            tl.store(p_tile_expert + b_tile + i, i_e, mask=mask)
            tl.store(p_tile_first + b_tile + i, b_first + i * PAIRS, mask=mask)
            tl.store(p_tile_end + b_tile + i, b_first + b_total, mask=mask)
        for i in range(tl.sum(b_tiles, 0), num_tiles, BLOCK):
            tl.store(p_tile_expert + i + i_i, -1, mask=i + i_i < num_tiles)


def sort_pairs(local_ids_TK: Tensor, experts: int, pairs_of_tile: int, memory: Memory) -> SortedPairs:
    """Of contiguous int32 ids, -1 for experts that are elsewhere. One launch for up to 1,024 pairs, two for more."""
    pairs, device = local_ids_TK.numel(), local_ids_TK.device
    # no more tiles than pairs, and at most one unfilled tile per expert
    count = min(pairs, pairs // pairs_of_tile + experts)
    order_P = memory.empty((pairs,), torch.int32, device)
    # rows of whole 16 bytes, or the pointers' alignment would make for more variants
    tile_3N = memory.empty((3, triton.cdiv(count, 4) * 4), torch.int32, device)
    block = _BLOCKS[pairs > _BLOCKS[0]]
    blocks, block_e = triton.cdiv(pairs, block), max(triton.next_power_of_2(experts), 16)
    counts_BE = memory.empty((blocks, block_e), torch.int32, device)
    if blocks > 1:
        experts_count_fwd_kernel[(blocks,)](local_ids_TK, counts_BE, pairs, BLOCK_E=block_e, BLOCK=block)
    experts_place_fwd_kernel[(blocks,)](
        local_ids_TK, counts_BE, order_P, *tile_3N, pairs, count,
        BLOCK_E=block_e, BLOCK=block, ROWS=_ROWS, PAIRS=pairs_of_tile, ALONE=blocks <= 1,
    )  # fmt: skip
    return SortedPairs(order_P, tile_3N, count)
