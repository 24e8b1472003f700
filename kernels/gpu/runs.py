"""Finding one's place in the ragged runs of a step, on the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of_run(p_starts, num_runs, i_block, BLOCK: tl.constexpr):
    """Where every run is cut into blocks of BLOCK rows: the run of block ``i_block``, and the run's row it begins at.

    The run is -1 for blocks past the last; ``num_rows // BLOCK + num_runs`` blocks are always enough.
    """
    i_run = -1
    i_first = 0
    seen = 0
    for i in range(num_runs):
        count = tl.cdiv(tl.load(p_starts + i + 1) - tl.load(p_starts + i), BLOCK)
        inside = (i_block >= seen) & (i_block < seen + count)
        i_run = tl.where(inside, i, i_run)
        i_first = tl.where(inside, (i_block - seen) * BLOCK, i_first)
        seen += count
    return i_run, i_first


@triton.jit
def run_of_row(p_starts, num_runs, i_row, BLOCK: tl.constexpr):
    """The run that owns a row; ``num_runs`` for rows that none does."""
    i_run = 0
    for i in range(0, num_runs, BLOCK):
        i_end = i + tl.arange(0, BLOCK)
        b_end = tl.load(p_starts + 1 + i_end, mask=i_end < num_runs, other=2147483647)
        i_run += tl.sum((b_end <= i_row).to(tl.int32), 0)
    return i_run
