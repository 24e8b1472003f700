"""Elements past the 2^31st of each pool. Memory that is not touched costs nothing; a 32-bit offset would crash."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.select import Kernels

TRITON = cast(Kernels, SimpleNamespace(**triton_operations(Chip.H100)))
FAR = 2**31


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_kv_pages() -> None:
    heads, dim, page = 2, 64, 16
    pages = FAR // (heads * dim * page) + 2
    pool = KvPool(*(torch.empty((pages * page, heads, dim), dtype=torch.bfloat16) for _ in range(2)), page_size=page)
    rows = torch.randn(1, 4 * heads * dim)
    norm = QkNorm(torch.ones(dim), torch.ones(dim), 1e-6)
    at = (pages - 1) * page
    unturned = torch.cat([torch.ones(1, 16), torch.zeros(1, 16)], -1)
    q = TRITON.attention_inputs(rows, unturned, norm, pool, ints(at), heads)
    values = rows[0, 3 * heads * dim :]
    assert torch.equal(pool.value_PJD[at].flatten(), values.bfloat16())
    for attend in (TRITON.attention_decode, TRITON.attention_prefill):
        out = attend(q.bfloat16(), rows, pool, ints(0, 1), ints(0), ints(pages - 1)[None])
        gate = rows[0, heads * dim : 2 * heads * dim].sigmoid()
        torch.testing.assert_close(out[0].float(), values * gate, atol=2e-2, rtol=2e-2)


@pytest.mark.verify
def test_state_slots() -> None:
    heads, dim, ring = 4, 128, 4
    slots = FAR // (heads * dim * dim) + 2
    channels = 3 * heads * dim
    shapes = [(heads, dim, dim), (ring, channels), (ring, heads, dim), (ring, heads, dim), (ring, heads)]
    memory = (torch.empty((slots, *shape)) for shape in shapes)
    state = DeltaState(*memory, position_S=torch.empty(slots, dtype=torch.int32))
    weights = DeltaWeights(torch.randn(4, channels), -torch.rand(heads), torch.randn(heads), torch.ones(dim), 1e-6)
    slot, rows = slots - 1, torch.randn(1, channels + heads * (dim + 2))
    state.state_SHKV[slot], state.position_S[slot] = 0.0, 0
    out = TRITON.gated_delta_decode(rows, weights, state, ints(0, 1), ints(0), ints(slot))
    assert out.isfinite().all()
    assert torch.equal(state.conv_SRC[slot, 0], rows[0, :channels])
    TRITON.gated_delta_flush(state, ints(slot), ints(1))
    written = state.key_SRGK[slot, 0, :, :, None] * state.delta_SRHV[slot, 0, :, None]
    torch.testing.assert_close(state.state_SHKV[slot], written, atol=1e-6, rtol=1e-6)
    left = slot - 1
    out = TRITON.gated_delta_prefill(
        rows, weights, state, ints(0, 1), ints(1), ints(slot), Leaves(ints(0, 1), ints(2), ints(left))
    )
    assert out.isfinite().all()
    assert state.state_SHKV[left].isfinite().all()
    assert (state.state_SHKV[left] != written).any()
    assert state.position_S[left] == 2
    assert torch.equal(state.conv_SRC[left, 1], rows[0, :channels])
