"""Paged attention: both implementations against attention written out over contiguous keys and values."""

from __future__ import annotations

import pytest
import torch

from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.select import Kernels
from tests.kernels.conftest import expect_close

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 4), (4, 2, 24), (6, 2, 10), (16, 2, 64)])
def test_decode(kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    torch.manual_seed(heads)
    pool = make_pool(12, kv_heads, dim, dtype)
    lengths, rows_each, tables = [9, 0, 3], [1, 2, 1], [[7, 2, 5], [0, 0, 0], [11, 0, 0]]
    starts = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    tensors = [
        torch.randn(2, length + n, kv_heads, dim).to(dtype) for length, n in zip(lengths, rows_each, strict=True)
    ]
    for table, (keys, values) in zip(tables, tensors, strict=True):
        fill(pool, table, keys, values)
    q, rows = torch.randn(4, heads, dim), torch.randn(4, 2 * (heads + kv_heads) * dim)
    actual = kernels.attention_decode(
        q, rows, pool, starts, torch.tensor(lengths, dtype=torch.int32), torch.tensor(tables, dtype=torch.int32)
    )
    row = 0
    for (keys, values), length, n in zip(tensors, lengths, rows_each, strict=True):
        for i in range(n):
            gate = rows[row, heads * dim : 2 * heads * dim]
            want = expected(q[row], keys[: length + i + 1], values[: length + i + 1], gate)
            expect_close("attention", actual[row], want, dtype)
            row += 1


@pytest.mark.parametrize("length", [0, 1, 13])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_prefill(kernels: Kernels, length: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    heads, kv_heads, dim = 4, 2, 8
    total = length + tokens
    pool = make_pool(90, kv_heads, dim, torch.float32)
    pages = torch.randperm(90)[: -(-total // PAGE)].to(torch.int32)
    keys, values = torch.randn(2, total, kv_heads, dim)
    fill(pool, pages.tolist(), keys, values)
    q, rows = torch.randn(tokens, heads, dim), torch.randn(tokens, 2 * (heads + kv_heads) * dim)
    actual = kernels.attention_prefill(q, rows, pool, pages, length)
    for i in range(0, tokens, 7):
        gate = rows[i, heads * dim : 2 * heads * dim]
        expect_close("attention", actual[i], expected(q[i], keys[: length + i + 1], values[: length + i + 1], gate))


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
