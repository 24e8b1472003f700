"""The delta rule over slots and rings: both implementations against a plain loop over the whole history."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate

import pytest
import torch
from torch.nn.functional import silu, softplus

from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves, ring_entries
from divisi.kernels.gated_delta.reference import flush
from divisi.kernels.select import Kernels
from tests.kernels.conftest import expect_close

SHAPES = [(1, 1, 4, 4, 4), (2, 4, 8, 16, 4), (2, 2, 5, 7, 2), (1, 4, 24, 12, 3)]  # G, H, K, V, conv taps
SLOTS = 5


def make_layer(shape: tuple[int, ...], max_rows: int = 1) -> tuple[DeltaWeights, DeltaState, int]:
    """Weights, NaN-poisoned state, and the width of a projected row."""
    groups, heads, key_dim, value_dim, taps = shape
    channels, ring = 2 * groups * key_dim + heads * value_dim, ring_entries(max_rows, taps)
    weights = DeltaWeights(
        torch.randn(taps, channels), -torch.rand(heads) * 4, torch.randn(heads), torch.randn(value_dim), 1e-6
    )
    sizes = [
        (heads, key_dim, value_dim),
        (ring, channels),
        (ring, groups, key_dim),
        (ring, heads, value_dim),
        (ring, heads),
    ]
    memory = [torch.full((SLOTS, *size), torch.nan) for size in sizes]
    state = DeltaState(*memory, torch.zeros(SLOTS, dtype=torch.int32))
    return weights, state, channels + heads * value_dim + 2 * heads


def naive(rows: torch.Tensor, weights: DeltaWeights, shape: tuple[int, ...]) -> torch.Tensor:
    """The recurrence over a whole sequence, one token and one head at a time, from its definition."""
    groups, heads, key_dim, value_dim, taps = shape
    channels = 2 * groups * key_dim + heads * value_dim
    conv, z, b, a = rows.double().split([channels, heads * value_dim, heads, heads], dim=1)
    padded = torch.cat([torch.zeros(taps - 1, channels), conv])
    out = torch.zeros(len(rows), heads, value_dim, dtype=torch.float64)
    state = torch.zeros(heads, key_dim, value_dim, dtype=torch.float64)
    for t in range(len(rows)):
        mixed = silu((padded[t : t + taps] * weights.conv_WC).sum(0))
        q, k, v = mixed.split([groups * key_dim, groups * key_dim, heads * value_dim])
        for h in range(heads):
            g = h // (heads // groups)
            q_h, k_h = (x.view(groups, key_dim)[g] for x in (q, k))
            q_h, k_h = (x / (x.square().sum() + 1e-6).sqrt() for x in (q_h, k_h))
            decay = (weights.rate_H[h] * softplus(a[t, h] + weights.dt_bias_H[h])).exp()
            state[h] *= decay
            delta = b[t, h].sigmoid() * (v.view(heads, value_dim)[h] - state[h].T @ k_h)
            state[h] += torch.outer(k_h, delta)
            o = state[h].T @ q_h * key_dim**-0.5
            o = o / (o.square().mean() + weights.eps).sqrt() * weights.norm_V
            out[t, h] = o * silu(z[t].view(heads, value_dim)[h])
    return out.flatten(1).float()


def decode(
    kernels: Kernels, rows: torch.Tensor, weights: DeltaWeights, state: DeltaState, length: int, slot: int
) -> torch.Tensor:
    starts = torch.tensor([0, len(rows)], dtype=torch.int32)
    return kernels.gated_delta_decode(
        rows.contiguous(),
        weights,
        state,
        starts,
        torch.tensor([length], dtype=torch.int32),
        torch.tensor([slot], dtype=torch.int32),
    )


def ints(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def scan(
    kernels: Kernels,
    rows: torch.Tensor,
    weights: DeltaWeights,
    state: DeltaState,
    *runs: tuple[int, int, int, dict[int, int]],
) -> torch.Tensor:
    """Prefill runs of (rows, length, source, slot to leave by position)."""
    counts, lengths, sources, left = zip(*runs, strict=True)
    leaves = Leaves(
        ints(accumulate(map(len, left), initial=0)),
        ints(position for slots in left for position in slots),
        ints(slot for slots in left for slot in slots.values()),
    )
    starts = ints(accumulate(counts, initial=0))
    return kernels.gated_delta_prefill(rows.contiguous(), weights, state, starts, ints(lengths), ints(sources), leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 3, 7, 150])
def test_prefill_in_chunks_then_decode(kernels: Kernels, shape: tuple[int, ...], chunk: int) -> None:
    torch.manual_seed(7)
    weights, state, width = make_layer(shape)
    prompt, total = 137, 150
    rows = torch.randn(total, width)
    outs, slot, spare = [], 3, 1
    for start in range(0, prompt, chunk):
        part = rows[start : min(start + chunk, prompt)]
        end = start + len(part)
        outs.append(scan(kernels, part, weights, state, (len(part), start, slot if start else -1, {end: spare})))
        slot, spare = spare, slot
    for position in range(prompt, total):
        outs.append(decode(kernels, rows[position : position + 1], weights, state, position, slot))
    expect_close("gated_delta", torch.cat(outs), naive(rows, weights, shape))


@pytest.mark.parametrize("seed", range(4))
def test_rejected_rows_and_replayed_steps_leave_no_trace(kernels: Kernels, seed: int) -> None:
    """Steps of several rows with a random prefix accepted, some run twice, equal the accepted history."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape, max_rows = SHAPES[seed], 4
    weights, state, width = make_layer(shape, max_rows)
    rows = torch.randn(60, width)
    outs = [scan(kernels, rows[:5], weights, state, (5, 0, -1, {5: 2}))]
    length = 5
    while length < 50:
        proposed = rng.randint(1, max_rows)
        accepted = rng.randint(1, proposed)
        step = torch.cat([rows[length : length + accepted], torch.randn(proposed - accepted, width)])
        for _ in range(rng.randint(1, 2)):
            out = decode(kernels, step, weights, state, length, 2)
        outs.append(out[:accepted])
        length += accepted
    expect_close("gated_delta", torch.cat(outs), naive(rows[:length], weights, shape))
    flush(state, 2, length)
    assert int(state.position_S[2]) == length
    expect_close(
        "gated_delta",
        decode(kernels, rows[length : length + 1], weights, state, length, 2),
        naive(rows[: length + 1], weights, shape)[-1:],
    )


def test_native_decode_continues_prefill_to_the_bit(native: Kernels) -> None:
    torch.manual_seed(8)
    weights, state, width = make_layer(SHAPES[1])
    rows = torch.randn(20, width)
    whole = scan(native, rows, weights, state, (20, 0, -1, {20: 1}))
    outs = [scan(native, rows[:6], weights, state, (6, 0, -1, {6: 2}))]
    outs += [decode(native, rows[p : p + 1], weights, state, p, 2) for p in range(6, 20)]
    assert torch.equal(torch.cat(outs), whole)


def test_sequences_of_a_batch_do_not_touch_each_other(native: Kernels) -> None:
    torch.manual_seed(9)
    weights, state, width = make_layer(SHAPES[1])
    rows = torch.randn(8, width)
    scan(native, rows[[0, 1, 2, 0, 1, 2]], weights, state, (3, 0, -1, {3: 0}), (3, 0, -1, {3: 4}))
    alone = decode(native, rows[3:4], weights, state, 3, 0)
    starts, slots = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([4, 0], dtype=torch.int32)
    both = native.gated_delta_decode(
        rows[[3, 3]], weights, state, starts, torch.tensor([3, 3], dtype=torch.int32), slots
    )
    assert torch.equal(both, alone.expand(2, -1))
