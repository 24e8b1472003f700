"""Inputs for every operation: ragged, with poisoned memory around what is read.

Floats that are activations, weights or KV take the dtype asked for; recurrent state, rings and norm scales are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.experts.layout import Tree
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves, ring_entries
from divisi.kernels.select import Kernels

_MANY = 2**16


@dataclass(frozen=True, slots=True)
class Case:
    """One call of one operation."""

    operation: str
    name: str
    arguments: tuple[Any, ...]
    written: tuple[int, ...] = ()
    """Which arguments the call writes to; they are compared too."""
    bytes: float = 0
    """What the call must read and write at least."""
    flops: float = 0
    between: float = 0
    """Bytes that its launches hand to each other."""
    several: Callable[..., Any] | None = None
    """Where the operation stands for several calls: makes them, of kernels and the arguments."""

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        """Call on copies of what is written; return every result by name."""
        arguments = [copied(a) if i in self.written else a for i, a in enumerate(self.arguments)]
        result = self.call(kernels)(*arguments)
        returned = result if isinstance(result, tuple) else () if result is None else (result,)
        results = {f"result{i}": x for i, x in enumerate(returned)}
        for i in self.written:
            for name, tensor in _tensors(arguments[i]):
                results[f"argument{i}{name}"] = tensor
        return results

    def call(self, kernels: Kernels) -> Callable[..., Any]:
        """What is called with the arguments."""
        if self.several is not None:
            return partial(self.several, kernels)
        operation: Callable[..., Any] = getattr(kernels, self.operation)
        return operation

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The same case with other tensors."""
        arguments = tuple(_map(a, change) for a in self.arguments)
        return replace(self, arguments=arguments)


def copied(value: Any) -> Any:
    """A value with copies of its tensors."""
    return _map(value, torch.clone)


def exact(tensor: Tensor) -> Tensor:
    """In fp32 where it is a float: what the reference gets to see."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_map(getattr(value, field.name), change) for field in fields(value)))
    return value


def _tensors(value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [("", value)]
    found = [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    return [(name, x) for name, x in found if isinstance(x, Tensor)]


class Draw:
    """Seeded tensors on a device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in the dtype of activations and weights, or another. Many are drawn on the device itself."""
        dtype = dtype or self.dtype
        if self.device.type == "cpu" or math.prod(size) < _MANY:
            return (torch.randn(size, generator=self._generator) * scale).to(dtype).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.below(2**31))
        return torch.empty(size, dtype=dtype, device=self.device).normal_(0.0, scale, generator=generator)

    def uniform(self, *size: int) -> Tensor:
        """Numbers in [0, 1), fp32."""
        return torch.rand(size, generator=self._generator).to(self.device)

    def below(self, limit: int) -> int:
        """One integer."""
        return int(torch.randint(limit, (), generator=self._generator))

    def order(self, count: int) -> Tensor:
        """A permutation, int64."""
        return torch.randperm(count, generator=self._generator)

    def ints(self, values: Sequence[int]) -> Tensor:
        """int32 on the device."""
        return torch.tensor(list(values), dtype=torch.int32).to(self.device)


def rms_norm(draw: Draw, name: str, tokens: int, width: int) -> Case:
    """The first norm of a layer."""
    x, scale = draw.normal(tokens, width), draw.normal(width, dtype=torch.float32)
    return Case("rms_norm", name, (x, scale, 1e-6), bytes=2 * x.nbytes)


def add_rms_norm(draw: Draw, name: str, tokens: int, width: int) -> Case:
    """Every other norm."""
    x, update, scale = draw.normal(tokens, width), draw.normal(tokens, width), draw.normal(width, dtype=torch.float32)
    return Case("add_rms_norm", name, (x, update, scale, 1e-6), written=(0,), bytes=4 * x.nbytes)


def silu_mul(draw: Draw, name: str, tokens: int, inner: int) -> Case:
    """The shared expert's product."""
    gate_up = draw.normal(tokens, 2 * inner, scale=3.0)
    return Case("silu_mul", name, (gate_up,), bytes=1.5 * gate_up.nbytes)


def route(draw: Draw, name: str, tokens: int, experts: int, chosen: int, *, ties: bool = False) -> Case:
    """A view, as where the shared gate's logit lies beside; ``ties`` rounds logits so that many are equal."""
    logits = draw.normal(tokens, experts + 1, scale=2.0)
    logits = (logits.round() if ties else logits)[:, :experts]
    return Case("route", name, (logits, chosen, True), bytes=logits.numel() * logits.itemsize)


def routed_experts(
    draw: Draw, name: str, tokens: int, chosen: int, experts: int, width: int, inner: int, *, elsewhere: int = 0,
    only: int | None = None,
) -> Case:  # fmt: skip
    """``elsewhere`` experts are on other shards; ``only`` sends every token there, and the other weights are poison."""
    x, gates = draw.normal(tokens, width), draw.uniform(tokens, chosen)
    ids = torch.stack([draw.order(experts + elsewhere)[:chosen] for _ in range(tokens)]) if tokens else None
    ids = torch.empty((0, chosen)) if ids is None else ids
    ids = torch.where(ids >= experts, -1, ids).to(torch.int32)
    gate_up = draw.normal(experts, 2 * inner, width, scale=width**-0.5)
    down = draw.normal(experts, width, inner, scale=inner**-0.5)
    if only is not None:
        ids = torch.full_like(ids, -1)
        ids[:, 0] = only
        others = [e for e in range(experts) if e != only]
        gate_up[others], down[others] = torch.nan, torch.nan
    touched, pairs = len(ids.unique()) - int((ids < 0).any()), int((ids >= 0).sum())
    per_expert = (gate_up[0].nbytes + down[0].nbytes) if experts else 0
    moved = touched * per_expert + x.nbytes + 4 * tokens * width
    return Case(
        "routed_experts", name,
        (x, ids.to(draw.device), gates, Tree.of(range(experts), 32, draw.device), gate_up, down),
        bytes=moved, flops=6.0 * pairs * width * inner, between=2 * pairs * (inner + width) * down.itemsize,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heads:
    """Of attention."""

    query: int
    key: int
    dim: int
    rotary: int
    page: int


def attention_inputs(draw: Draw, name: str, tokens: int, heads: Heads, pages: int) -> Case:
    """One row in seven is padding."""
    rows = draw.normal(tokens, 2 * (heads.query + heads.key) * heads.dim)
    angles = 6.3 * draw.uniform(tokens, heads.rotary // 2)
    scales = [1 + 0.1 * draw.normal(heads.dim, dtype=torch.float32) for _ in range(2)]
    norm = QkNorm(scales[0], scales[1], 1e-6)
    kv_rows = draw.order(pages * heads.page)[:tokens].to(torch.int32).to(draw.device)
    pool = _pool(draw, pages, heads)
    moved = rows.nbytes * (heads.query + 2 * heads.key) / (heads.query + heads.key)
    return Case(
        "attention_inputs", name,
        (rows, torch.cat([angles.cos(), angles.sin()], -1), norm, pool, kv_rows, heads.query), written=(3,),
        bytes=moved + angles.nbytes * 2,
    )  # fmt: skip


def _pool(draw: Draw, pages: int, heads: Heads) -> KvPool:
    size = (pages * heads.page, heads.key, heads.dim)
    key, value = [torch.full(size, torch.nan, dtype=draw.dtype, device=draw.device) for _ in range(2)]
    return KvPool(key, value, heads.page)


def attention(
    draw: Draw,
    name: str,
    operation: str,
    heads: Heads,
    lengths: Sequence[int],
    rows: Sequence[int],
    first: int = 0,
) -> Case:
    """Runs over their own pages in a random order; what no run holds, and what stands before `first`, is NaN."""
    total = sum(rows)
    needed = [-(-(length + n) // heads.page) for length, n in zip(lengths, rows, strict=True)]
    order = iter(draw.order(sum(needed) + 3).tolist())
    pool = _pool(draw, sum(needed) + 3, heads)
    tables = torch.zeros((len(rows), max([*needed, 1])), dtype=torch.int32)
    for run, (length, n) in enumerate(zip(lengths, rows, strict=True)):
        tables[run, : needed[run]] = torch.tensor([next(order) for _ in range(needed[run])], dtype=torch.int32)
        at = torch.arange(first, length + n)
        kv_rows = (tables[run, at // heads.page].long() * heads.page + at % heads.page).to(draw.device)
        for tensor in (pool.key_PJD, pool.value_PJD):
            tensor[kv_rows] = draw.normal(len(at), heads.key, heads.dim)
    q, gate = draw.normal(total, heads.query, heads.dim), draw.normal(total, 2 * (heads.query + heads.key) * heads.dim)
    starts = draw.ints([sum(rows[:i]) for i in range(len(rows) + 1)])
    seen = [n * length + n * (n + 1) // 2 for length, n in zip(lengths, rows, strict=True)]
    held = sum(length + n for length, n in zip(lengths, rows, strict=True) if n)
    return Case(
        operation, name,
        (q, gate, pool, starts, draw.ints(lengths), tables.to(draw.device), *([first] if first else [])),
        bytes=2 * held * heads.key * heads.dim * q.itemsize + 3 * q.nbytes,
        flops=4.0 * sum(seen) * heads.query * heads.dim,
        between=_split_bytes(heads, lengths, rows) if operation == "attention_decode" else 0,
    )  # fmt: skip


def _split_bytes(heads: Heads, lengths: Sequence[int], rows: Sequence[int]) -> float:
    splits = sum(n * -(-(length + n) // 512) for length, n in zip(lengths, rows, strict=True))
    return 8.0 * splits * heads.query * (heads.dim + 2)


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Of a Gated DeltaNet layer."""

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.groups * self.key_dim + self.heads * self.value_dim

    @property
    def row(self) -> int:
        """P."""
        return self.channels + self.heads * (self.value_dim + 2)


def _delta_memory(draw: Draw, shape: DeltaShape, slots: int, max_rows: int) -> tuple[DeltaWeights, DeltaState]:
    weights = DeltaWeights(
        draw.normal(shape.taps, shape.channels, scale=0.5, dtype=torch.float32), -4.0 * draw.uniform(shape.heads),
        draw.normal(shape.heads, scale=2.0, dtype=torch.float32) - 3.0,
        draw.normal(shape.value_dim, dtype=torch.float32), 1e-6,
    )  # fmt: skip
    ring = ring_entries(max_rows, shape.taps)
    sizes = [
        (shape.heads, shape.key_dim, shape.value_dim), (ring, shape.channels), (ring, shape.groups, shape.key_dim),
        (ring, shape.heads, shape.value_dim), (ring, shape.heads),
    ]  # fmt: skip
    state, conv, key, delta, decay = (torch.full((slots, *size), torch.nan, device=draw.device) for size in sizes)
    position = torch.zeros(slots, dtype=torch.int32, device=draw.device)
    return weights, DeltaState(state, conv, key, delta, decay, position)


def gated_delta_decode(
    draw: Draw, name: str, shape: DeltaShape, rows: Sequence[int], lags: Sequence[int], max_rows: int
) -> Case:
    """Slots that lag behind by ``lags`` tokens; the last sequence's slot is -1 where it has no rows."""
    runs, total = len(rows), sum(rows)
    weights, state = _delta_memory(draw, shape, runs + 2, max_rows)
    slots = draw.order(runs + 2)[:runs].tolist()
    lengths = [max(lag, 11 + draw.below(40)) for lag in lags]
    for slot, length, lag in zip(slots, lengths, lags, strict=True):
        state.state_SHKV[slot] = draw.normal(*state.state_SHKV.shape[1:], scale=0.3, dtype=torch.float32)
        state.position_S[slot] = length - lag
        entries = [(length - back) % state.ring for back in range(1, max(max_rows, shape.taps - 1) + 1)]
        state.conv_SRC[slot, entries] = draw.normal(len(entries), shape.channels).float()
        keys = draw.normal(len(entries), shape.groups, shape.key_dim, dtype=torch.float32)
        state.key_SRGK[slot, entries] = keys / keys.norm(dim=-1, keepdim=True)
        state.delta_SRHV[slot, entries] = draw.normal(len(entries), shape.heads, shape.value_dim, dtype=torch.float32)
        state.decay_SRH[slot, entries] = draw.uniform(len(entries), shape.heads)
    if runs and rows[-1] == 0:
        slots[-1] = -1
    starts = draw.ints([sum(rows[:i]) for i in range(runs + 1)])
    projected = draw.normal(total, shape.row)
    per_state = 4 * shape.heads * shape.key_dim * shape.value_dim
    entry = 4 * (shape.groups * shape.key_dim + shape.heads * (shape.value_dim + 1))
    rings = sum(n * (entry + 4 * shape.channels) + lag * entry for n, lag in zip(rows, lags, strict=True))
    rings += sum(map(bool, rows)) * (shape.taps - 1) * 4 * shape.channels
    moved = rings + sum((per_state * (2 if lag else 1)) for n, lag in zip(rows, lags, strict=True) if n)
    return Case(
        "gated_delta_decode", name, (projected, weights, state, starts, draw.ints(lengths), draw.ints(slots)),
        written=(2,), bytes=moved + projected.nbytes + 2 * total * shape.heads * shape.value_dim,
        flops=sum((7 * n + 3 * lag) * per_state / 4 for n, lag in zip(rows, lags, strict=True)),
        between=8.0 * total * shape.heads * shape.value_dim,
    )  # fmt: skip


def gated_delta_flush(draw: Draw, name: str, shape: DeltaShape, lags: Sequence[int], max_rows: int) -> Case:
    """Slots that lag behind by ``lags`` tokens."""
    decode = gated_delta_decode(draw, name, shape, [1] * len(lags), lags, max_rows)
    _, _, state, _, lengths_S, slots_S = decode.arguments
    return Case("gated_delta_flush", name, (state, slots_S, lengths_S), written=(0,))


def gated_delta_prefill(
    draw: Draw, name: str, shape: DeltaShape, lengths: Sequence[int], rows: Sequence[int],
    middles: Sequence[Sequence[int]] | None = None, *, repeated: bool = False,
) -> Case:  # fmt: skip
    """Runs from a source each (none at 0), each leaving a state after ``middles`` rows and at its end.

    ``repeated`` makes all rows one and the same, hardly decayed and strongly written: the hardest chunk to invert.
    """
    runs = len(rows)
    after = [[*m, n] if n else [] for m, n in zip(middles or [()] * runs, rows, strict=True)]
    weights, state = _delta_memory(draw, shape, runs + sum(map(len, after)) + 1, 1)
    slots = draw.order(state.state_SHKV.shape[0]).tolist()
    sources = [slots.pop() if length else -1 for length in lengths]
    for source, length in zip(sources, lengths, strict=True):
        if length:
            state.state_SHKV[source] = draw.normal(*state.state_SHKV.shape[1:], scale=0.3, dtype=torch.float32)
            state.position_S[source] = length
            entries = [(length - back) % state.ring for back in range(1, min(shape.taps - 1, length) + 1)]
            state.conv_SRC[source, entries] = draw.normal(len(entries), shape.channels).float()
    positions = [length + n for length, ns in zip(lengths, after, strict=True) for n in ns]
    ends = [sum(map(len, after[:i])) for i in range(runs + 1)]
    leaves = Leaves(draw.ints(ends), draw.ints(positions), draw.ints([slots.pop() for _ in positions]))
    starts = draw.ints([sum(rows[:i]) for i in range(runs + 1)])
    projected = draw.normal(sum(rows), shape.row)
    if repeated:
        projected[:] = projected[0].clone()
        projected[:, -2 * shape.heads : -shape.heads] = 6.0
        projected[:, -shape.heads :] = -6.0
    out = 2 * sum(rows) * shape.heads * shape.value_dim
    per_row = 2.0 * shape.heads * (64 * (2 * shape.key_dim + 2 * shape.value_dim) + 3 * shape.key_dim * shape.value_dim)
    return Case(
        "gated_delta_prefill", name,
        (projected, weights, state, starts, draw.ints(lengths), draw.ints(sources), leaves), written=(2,),
        bytes=projected.nbytes + out, flops=per_row * sum(rows), between=_chunk_bytes(shape, rows, len(positions)),
    )  # fmt: skip


def _chunk_bytes(shape: DeltaShape, rows: Sequence[int], leaves: int) -> float:
    """fp32: conv outputs by row; w, u, k^T, deltas and the state before each chunk of 64; those of a leaf."""
    keys, values = shape.groups * shape.key_dim, shape.heads * shape.value_dim
    chunk = 64 * (2 * shape.heads * shape.key_dim + 2 * keys + 4 * values) + 2 * values * shape.key_dim
    leaf = 64 * (values + keys) + 2 * values * shape.key_dim + (shape.taps - 1) * shape.channels
    return 4.0 * (sum(rows) * (5 * keys + 2 * values) + sum(-(-n // 64) for n in rows) * chunk + leaves * leaf)
