"""The delta rule over slots and rings: both implementations against a plain loop over the whole history."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from itertools import accumulate

import pytest
import torch
from torch.nn.functional import silu, softplus

from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves, ring_entries
from divisi.kernels.gated_delta.reference import gated_delta_decode
from divisi.kernels.select import Kernels
from tests.kernels.conftest import expect_close

SHAPES = [
    (1, 1, 4, 4, 4),
    (2, 4, 8, 16, 4),
    (2, 2, 5, 7, 2),
    (1, 4, 24, 12, 3),
    (1, 2, 17, 54, 4),
]  # G, H, K, V, conv taps
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
    kernels.gated_delta_flush(state, ints([2]), ints([length]))
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


@pytest.mark.parametrize("shape", SHAPES)
def test_states_left_on_the_way_are_those_of_chunks(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """A run of 300 rows that leaves states at 37, 64 and 211 equals four chunks; on the native path bit for bit."""
    torch.manual_seed(10)
    weights, state, width = make_layer(shape)
    _, by_chunks, _ = make_layer(shape)
    rows, after = torch.randn(300, width), torch.randn(4, width)
    left = {37: 2, 64: 0, 211: 4, 300: 1}
    out, outs = scan(kernels, rows, weights, state, (300, 0, -1, left)), []
    start, source = 0, -1
    for end, slot in left.items():
        outs.append(scan(kernels, rows[start:end], weights, by_chunks, (end - start, start, source, {end: slot})))
        start, source = end, slot
    check = expect_bits if is_native(kernels) else functools.partial(expect_close, "gated_delta")
    check(out, torch.cat(outs))
    for at, slot in left.items():
        assert state.position_S[slot] == by_chunks.position_S[slot] == at
        check(state.state_SHKV[slot], by_chunks.state_SHKV[slot])
        check(*(decode(kernels, after, weights, memory, at, slot) for memory in (state, by_chunks)))


def test_lent_slot_is_only_read(kernels: Kernels) -> None:
    """Three runs of different lengths share a source; none changes a byte of it, and each is as it is alone."""
    torch.manual_seed(11)
    weights, state, width = make_layer(SHAPES[1])
    rows = torch.randn(40, width)
    scan(kernels, rows[:9], weights, state, (9, 0, -1, {9: 3}))
    before = [tensor[3].clone() for tensor in state.tensors]
    runs = [(1, 9, 3, {10: 0}), (20, 9, 3, {11: 1, 29: 2}), (10, 9, 3, {19: 4})]
    together = scan(kernels, rows[9:], weights, state, *runs)
    for tensor, copy in zip(state.tensors, before, strict=True):
        expect_bits(tensor[3], copy)
    left = state.state_SHKV[[0, 1, 2, 4]].clone()
    starts = [9, 10, 30, 40]
    alone = [scan(kernels, rows[starts[i] : starts[i + 1]], weights, state, run) for i, run in enumerate(runs)]
    expect_bits(together, torch.cat(alone))
    expect_bits(state.state_SHKV[[0, 1, 2, 4]], left)


def test_long_runs_beside_each_other_are_as_alone(native: Kernels) -> None:
    """They are cut into pieces, which threads take in turns; one leaves the state it begins with."""
    torch.manual_seed(14)
    shape = (2, 4, 32, 32, 4)
    weights, state, width = make_layer(shape)
    rows = torch.randn(9 + 300 + 129, width)
    scan(native, rows[:9], weights, state, (9, 0, -1, {9: 4}))
    runs = [(300, 0, -1, {128: 0, 300: 1}), (129, 9, 4, {9: 2, 138: 3})]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        together = scan(native, rows[9:438], weights, state, *runs)
        left = state.state_SHKV[:4].clone()
        parts = rows[9:309], rows[309:438]
        alone = [scan(native, part, weights, state, run) for part, run in zip(parts, runs, strict=True)]
        expect_bits(together, torch.cat(alone))
        expect_bits(state.state_SHKV[:4], left)
        expect_bits(left[2], state.state_SHKV[4])
    torch.set_num_threads(2)


def test_sources_that_stand_elsewhere_or_would_be_written_are_refused(kernels: Kernels) -> None:
    weights, state, width = make_layer(SHAPES[0])
    rows = torch.zeros(4, width)
    scan(kernels, rows, weights, state, (4, 0, -1, {4: 2}))
    with pytest.raises(AssertionError, match="a source would be written"):
        scan(kernels, rows[:2], weights, state, (1, 0, -1, {1: 2}), (1, 4, 2, {5: 0}))
    decode(kernels, rows[:1], weights, state, 4, 2)  # now it lags: its ring has a token more
    with pytest.raises(AssertionError, match=r"stand at \[4\], runs begin at \[5\]"):
        scan(kernels, rows[:1], weights, state, (1, 5, 2, {6: 0}))
    with pytest.raises(AssertionError, match=r"stand at \[0\], runs begin at \[1\]"):
        scan(kernels, rows[:1], weights, state, (1, 1, -1, {2: 0}))


def test_runs_without_rows_touch_nothing(kernels: Kernels) -> None:
    torch.manual_seed(12)
    weights, state, width = make_layer(SHAPES[1])
    rows = torch.randn(12, width)
    empty = (0, 0, -1, dict[int, int]())
    out = scan(kernels, rows[:8], weights, state, empty, (5, 0, -1, {5: 0}), empty, (3, 0, -1, {3: 1}), empty)
    expect_bits(out[5:], scan(kernels, rows[5:8], weights, state, (3, 0, -1, {3: 2})))
    starts = ints([0, 0, 2, 2])
    before = [tensor[[1, 3]].clone() for tensor in state.tensors]
    kernels.gated_delta_decode(rows[8:10].contiguous(), weights, state, starts, ints([9, 5, 0]), ints([3, 0, 1]))
    for tensor, copy in zip(state.tensors, before, strict=True):
        expect_bits(tensor[[1, 3]], copy)
    none = scan(kernels, rows[:0], weights, state, empty)
    assert none.shape == (0, 4 * 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_scan_gives_the_bits_of_ring_runs(native: Kernels, shape: tuple[int, ...]) -> None:
    """Rows that were decoded one, two or six at a time, and are computed again in one scan after a preemption."""
    torch.manual_seed(13)
    weights, state, width = make_layer(shape, max_rows=6)
    rows = torch.randn(70, width)
    outs, at = [scan(native, rows[:7], weights, state, (7, 0, -1, {7: 0}))], 7
    for count in (1, 2, 6, 1, 6, 6, 2, 1, 1) * 2:
        outs.append(decode(native, rows[at : at + count], weights, state, at, 0))
        at += count
    again = scan(native, rows[:at], weights, state, (at, 0, -1, {at: 1}))
    expect_bits(torch.cat(outs), again)
    native.gated_delta_flush(state, ints([0]), ints([at]))
    expect_bits(state.state_SHKV[0], state.state_SHKV[1])


def test_flush_brings_each_slot_to_its_position(kernels: Kernels) -> None:
    """Slots that lag by 6, 1 and no tokens; again it changes nothing, and a later decode gives the same bits."""
    torch.manual_seed(14)
    weights, state, width = make_layer(SHAPES[1], max_rows=6)
    _, untouched, _ = make_layer(SHAPES[1], max_rows=6)
    rows = torch.randn(20, width)
    lengths = {0: 11, 2: 6, 4: 5}
    for memory in (state, untouched):
        for slot, length in lengths.items():
            scan(kernels, rows[:5], weights, memory, (5, 0, -1, {5: slot}))
            if length > 5:
                decode(kernels, rows[5:length], weights, memory, 5, slot)
    for _ in range(2):
        kernels.gated_delta_flush(state, ints(lengths), ints(lengths.values()))
        assert state.position_S.tolist() == [11, 0, 6, 0, 5]
    kernels.gated_delta_flush(state, ints([0]), ints([8]))
    assert state.position_S[0] == 11
    for slot, length in lengths.items():
        row = rows[length : length + 1]
        expect_bits(*(decode(kernels, row, weights, memory, length, slot) for memory in (state, untouched)))


def is_native(kernels: Kernels) -> bool:
    return kernels.gated_delta_decode is not gated_delta_decode


def expect_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, in poisoned entries too."""
    assert torch.equal(actual.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))
