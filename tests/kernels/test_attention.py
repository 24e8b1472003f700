"""Paged attention: both implementations against attention written out over contiguous keys and values."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.select import Kernels
from tests.kernels.conftest import expect_close, packs

PAGE = 4


def make_pool(pages: int, kv_heads: int, dim: int, dtype: torch.dtype) -> KvPool:
    rows = (pages * PAGE, kv_heads, dim)
    return KvPool(torch.full(rows, torch.nan, dtype=dtype), torch.full(rows, torch.nan, dtype=dtype), PAGE)


def fill(pool: KvPool, pages: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
    for position in range(len(keys)):
        row = pages[position // PAGE] * PAGE + position % PAGE
        pool.key_PJD[row], pool.value_PJD[row] = keys[position], values[position]


def expected(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """One query row [Q, D] against all keys [L, J, D]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    weights = torch.softmax(torch.einsum("qd,lqd->ql", q, keys) * q.shape[-1] ** -0.5, -1)
    return torch.einsum("ql,lqd->qd", weights, values).flatten() * gate.sigmoid()


def kind_of(kernels: Kernels, dtype: torch.dtype) -> str:
    return "tiled attention" if dtype is torch.bfloat16 and packs(kernels) else "attention"


@pytest.mark.parametrize("operation", ["attention_decode", "attention_prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 4), (4, 2, 24), (6, 2, 10), (16, 2, 64)])
def test_runs(kernels: Kernels, operation: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(heads)
    lengths, counts, tables = [9, 0, 0, 3], [1, 2, 0, 6], [[7, 2, 5], [0, 0, 0], [0, 0, 0], [11, 4, 9]]
    shape, kind = (heads, kv_heads, dim), kind_of(kernels, dtype)
    check_runs(getattr(kernels, operation), dtype, shape, 12, lengths, counts, tables, every=1, kind=kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 3, 4, 6])
def test_a_run_that_begins_to_see_later(kernels: Kernels, first: int, dtype: torch.dtype) -> None:
    """What stands before is NaN, within a page or over several."""
    torch.manual_seed(first)
    tables = [[7, 2, 5, 1], [3, 0, 9, 8], [11, 4, 6, 10]]
    lengths, counts = [9, first, first + 1], [3, 1, 2]
    shape, kind = (4, 2, 24), kind_of(kernels, dtype)
    check_runs(kernels.attention_decode, dtype, shape, 12, lengths, counts, tables, every=1, first=first, kind=kind)


@pytest.mark.parametrize("length", [0, 1, 13])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_long_runs(kernels: Kernels, length: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    table = torch.randperm(180).tolist()
    tables = [table[:90], table[90:]]
    check_runs(kernels.attention_prefill, torch.float32, (4, 2, 8), 180, [length, 5], [tokens, 70], tables, every=7)


def check_runs(
    attend: Callable[..., torch.Tensor],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    num_pages: int,
    lengths: list[int],
    counts: list[int],
    tables: list[list[int]],
    every: int,
    first: int = 0,
    kind: str = "attention",
) -> None:
    """Run s has counts[s] rows from position lengths[s] on; every so many rows are compared."""
    heads, kv_heads, dim = shape
    pool = make_pool(num_pages, kv_heads, dim, dtype)
    memory = [torch.randn(2, sum(run), kv_heads, dim).to(dtype) for run in zip(lengths, counts, strict=True)]
    for table, (keys, values) in zip(tables, memory, strict=True):
        fill(pool, table, keys, values)
        for position in range(first):
            row = table[position // PAGE] * PAGE + position % PAGE
            pool.key_PJD[row] = pool.value_PJD[row] = torch.nan
    starts = [0, *accumulate(counts)]
    q, rows = torch.randn(starts[-1], heads, dim), torch.randn(starts[-1], 2 * (heads + kv_heads) * dim)
    ints = (torch.tensor(values, dtype=torch.int32) for values in (starts, lengths, tables))
    actual = attend(q, rows, pool, *ints, *([first] if first else []))
    for run, (keys, values) in enumerate(memory):
        for row in range(starts[run], starts[run + 1], every):
            gate, end = rows[row, heads * dim : 2 * heads * dim], lengths[run] + row - starts[run] + 1
            expect_close(kind, actual[row], expected(q[row], keys[first:end], values[first:end], gate), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", [2, 6, 12])
def test_inputs(native: Kernels, reference: Kernels, dtype: torch.dtype, rotary: int) -> None:
    torch.manual_seed(rotary)
    heads, kv_heads, dim, tokens = 4, 2, 12, 5
    norm = QkNorm(torch.randn(dim), torch.randn(dim), 1e-6)
    rows, angles = torch.randn(tokens, 2 * (heads + kv_heads) * dim), torch.randn(tokens, rotary // 2)
    cos_sin, kv_rows = torch.cat([angles.cos(), angles.sin()], -1), torch.tensor([3, 9, 4, 0, 7], dtype=torch.int32)
    pools = [make_pool(3, kv_heads, dim, dtype) for _ in range(2)]
    queries = [
        k.attention_inputs(rows, cos_sin, norm, pool, kv_rows, heads)
        for k, pool in zip((native, reference), pools, strict=True)
    ]
    expect_close("attention", queries[0], queries[1])
    # fp32 rounding may put a value on the other side of a bf16 step
    tolerance = {"atol": 1e-5, "rtol": 1e-5 if dtype is torch.float32 else 8e-3}
    torch.testing.assert_close(pools[0].key_PJD, pools[1].key_PJD, equal_nan=True, **tolerance)
    assert torch.equal(pools[0].value_PJD.nan_to_num(), pools[1].value_PJD.nan_to_num())


def test_inputs_without_queries(kernels: Kernels) -> None:
    """A row of keys and values alone leaves the bits that it leaves among queries and gates."""
    torch.manual_seed(0)
    heads, kv_heads, dim, tokens = 4, 2, 12, 3
    norm = QkNorm(torch.randn(dim), torch.randn(dim), 1e-6)
    rows, angles = torch.randn(tokens, 2 * (heads + kv_heads) * dim), torch.randn(tokens, 3)
    cos_sin, kv_rows = torch.cat([angles.cos(), angles.sin()], -1), torch.tensor([3, 9, 4], dtype=torch.int32)
    whole, part = (make_pool(3, kv_heads, dim, torch.float32) for _ in range(2))
    kernels.attention_inputs(rows, cos_sin, norm, whole, kv_rows, heads)
    kernels.attention_inputs(rows[:, 2 * heads * dim :].contiguous(), cos_sin, norm, part, kv_rows, 0)
    assert torch.equal(whole.key_PJD.nan_to_num(), part.key_PJD.nan_to_num())
    assert torch.equal(whole.value_PJD.nan_to_num(), part.value_PJD.nan_to_num())
