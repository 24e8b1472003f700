"""Gated delta rule over the scan runs of a step, chunk by chunk as in chunked.py.

Six launches: conv and norms of all rows; what each chunk can compute before it knows its state; the scan over each
run's chunks, which is all that has to wait for another chunk; the outputs of each chunk; the states left, each from the
chunk it lies in, since a row's delta depends on the rows before it only; their conv inputs and positions. A chunk is 64
rows from its run's first on.
Shapes: as in layout.py and chunked.py; B chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from divisi.kernels.gated_delta.layout import DeltaDims, DeltaState, DeltaWeights, Leaves
from divisi.kernels.gated_delta.triton_chunks import (
    gated_delta_chunk_fwd_kernel,
    gated_delta_conv_fwd_kernel,
    gated_delta_history_fwd_kernel,
    gated_delta_leaf_fwd_kernel,
    gated_delta_output_fwd_kernel,
    gated_delta_scan_fwd_kernel,
)
from divisi.kernels.gpu.chip import Chip

_CHUNK = 64
_CONV_ROWS = 32
_COPY_CHANNELS = 1024
_LEAF_BLOCK = 32


@dataclass(frozen=True, slots=True)
class _Tiles:
    block_v: int
    warps: int
    stages: int


# the scan: 16 columns make 256 programs of a run's 32 heads; a chunk's inputs are 68 KB, so an H100 loads two ahead.
# One stage on sm_100: with more, state that is carried through products in a loop has been seen to race there (triton
# issue 10590)
_SCAN = {Chip.A100: _Tiles(16, 8, 2), Chip.H100: _Tiles(16, 4, 3), Chip.B200: _Tiles(32, 4, 1)}
# chunks and outputs: 4 warps leave room for two programs a multiprocessor; elsewhere they would spill. On an H100 168
# registers instead of 246 make it three programs of chunks, which spill 56 bytes; a prefill then takes 3 % less
_CHUNK_WARPS = {Chip.A100: 8, Chip.H100: 4, Chip.B200: 8}
_CHUNK_REGISTERS = {Chip.A100: None, Chip.H100: 168, Chip.B200: None}
_OUTPUT_WARPS = {Chip.A100: 8, Chip.H100: 4, Chip.B200: 8}
# key dims of an output that are held at once: with 64 an A100 spills eight times as much. On an H100 64 are 1 % faster
# than 32 or 128
_OUTPUT_DIMS = {Chip.A100: 32, Chip.H100: 64, Chip.B200: 64}


def gated_delta_prefill(
    rows_TP: Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    starts_S1: Tensor,
    lengths_S: Tensor,
    sources_S: Tensor,
    leaves: Leaves,
    *,
    chip: Chip,
) -> Tensor:
    """See reference.py. Products run in tf32 for bf16 rows, in three tf32 products for fp32 rows."""
    assert rows_TP.stride(1) == 1
    dims, tiles, tokens, runs = DeltaDims.of(state), _SCAN[chip], rows_TP.shape[0], lengths_S.shape[0]
    groups, heads, key_dim, value_dim = dims.key_heads, dims.value_heads, dims.key_dim, dims.value_dim
    precision = "tf32x3" if rows_TP.dtype is torch.float32 else "tf32"
    block_k, block_v = (max(triton.next_power_of_2(dim), 16) for dim in (key_dim, value_dim))
    shape = {"G": groups, "H": heads, "K": key_dim, "V": value_dim}
    ring = {"W": weights.conv_WC.shape[0], "RING": state.ring}

    buffer = partial(torch.empty, device=rows_TP.device, dtype=torch.float32)
    chunks = tokens // _CHUNK + runs
    qk, v = buffer(tokens, 2 * groups, key_dim), buffer(tokens, heads, value_dim)
    w, (u, delta) = buffer(chunks * heads * _CHUNK, block_k), buffer(2, chunks * heads * _CHUNK, block_v)
    log, turned = buffer(chunks * heads * _CHUNK), buffer(chunks * groups * block_k, _CHUNK)
    before = buffer(chunks * heads * block_v, block_k)
    out_TX = torch.empty((tokens, heads * value_dim), dtype=rows_TP.dtype, device=rows_TP.device)
    runs_at = (starts_S1, lengths_S, sources_S)
    chunk = {"BLOCK_T": _CHUNK, "BLOCK_K": block_k, "PRECISION": precision}
    gated_delta_conv_fwd_kernel[(2 * groups + heads, tokens // _CONV_ROWS + runs)](
        rows_TP, weights.conv_WC, state.conv_SRC, *runs_at, qk, v, runs, rows_TP.stride(0),
        **shape, **ring, BLOCK_T=_CONV_ROWS, BLOCK_C=max(block_k, block_v), PRECISION=precision,
    )  # fmt: skip
    gated_delta_chunk_fwd_kernel[(heads, chunks)](
        rows_TP, weights.rate_H, weights.dt_bias_H, qk, v, starts_S1, w, u, log, turned, runs, rows_TP.stride(0),
        **shape, **chunk, BLOCK_V=block_v, INVERSE=precision,
        num_warps=_CHUNK_WARPS[chip], maxnreg=_CHUNK_REGISTERS[chip],
    )  # fmt: skip
    columns = min(tiles.block_v, block_v)
    described = (
        TensorDescriptor.from_tensor(turned, [block_k, _CHUNK]),
        TensorDescriptor.from_tensor(w, [_CHUNK, block_k]),
        TensorDescriptor.from_tensor(u, [_CHUNK, columns]),
    )
    gated_delta_scan_fwd_kernel[(block_v // columns, heads, runs)](
        *described, delta, log, before, state.state_SHKV, starts_S1, sources_S,
        **shape, **chunk, BLOCK_V=block_v, COLUMNS=columns, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    gated_delta_output_fwd_kernel[(heads, chunks)](
        rows_TP, weights.norm_V, qk, delta, log, before, starts_S1, out_TX, runs, rows_TP.stride(0), weights.eps,
        **shape, **chunk, BLOCK_V=block_v, PART_K=min(block_k, _OUTPUT_DIMS[chip]),
        num_warps=_OUTPUT_WARPS[chip] if block_v >= 128 else 4,
    )  # fmt: skip
    left = (leaves.starts_S1, leaves.positions_L, leaves.slots_L, runs)
    gated_delta_leaf_fwd_kernel[(block_v // columns, heads, leaves.slots_L.shape[0])](
        turned, delta, log, before, state.state_SHKV, starts_S1, lengths_S, *left,
        **shape, **chunk, BLOCK_V=block_v, COLUMNS=columns, BLOCK_S=_LEAF_BLOCK,
    )  # fmt: skip
    _leave_history(rows_TP, state, ring, runs_at, left)
    return out_TX


def _leave_history(
    rows_TP: Tensor,
    state: DeltaState,
    ring: Mapping[str, int],
    runs_at: tuple[Tensor, Tensor, Tensor],
    left: tuple[Tensor, Tensor, Tensor, int],
) -> None:
    channels = DeltaDims.of(state).conv_channels
    gated_delta_history_fwd_kernel[(left[2].shape[0], triton.cdiv(channels, _COPY_CHANNELS))](
        rows_TP, state.conv_SRC, state.position_S, *runs_at, *left, rows_TP.stride(0),
        C=channels, **ring, BLOCK_C=_COPY_CHANNELS, BLOCK_S=_LEAF_BLOCK,
    )  # fmt: skip
