"""Deterministic kernels: a row's bits are those that it has alone, whatever is beside it and however a run is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from divisi.kernels import select
from divisi.kernels.attention.layout import KvPool, QkNorm
from divisi.kernels.experts.layout import Tree
from divisi.kernels.gated_delta.layout import DeltaState, DeltaWeights, Leaves, ring_entries
from divisi.kernels.select import Kernels, select_kernels

MOST = 300
COUNTS = [*range(1, 71), 128, MOST]
DTYPES = [torch.float32, torch.bfloat16]
PAGE = 16


@pytest.fixture(scope="module")
def kernels(two_threads: None) -> Iterator[Kernels]:
    torch.set_num_threads(1)  # thousands of short calls
    yield select_kernels(torch.device("cpu"), deterministic=True)
    torch.set_num_threads(2)


def ints(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def expect_rows_alone(operation: Callable[[slice], torch.Tensor]) -> None:
    """Compare the rows of each count, at the beginning and at the end of all rows, with each row alone."""
    alone = torch.cat([operation(slice(row, row + 1)) for row in range(MOST)])
    for count in COUNTS:
        for rows in (slice(0, count), slice(MOST - count, MOST)):
            assert torch.equal(operation(rows), alone[rows]), f"{count} rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(72, 29), (128, 96)])
def test_linear(kernels: Kernels, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(MOST, inputs), kernels.pack_linear(torch.randn(outputs, inputs).to(dtype))
    expect_rows_alone(lambda rows: kernels.linear(x[rows], weight))


def test_norms_and_activation(kernels: Kernels) -> None:
    torch.manual_seed(2)
    x, update, scale = torch.randn(MOST, 75), torch.randn(MOST, 75), torch.randn(75)
    gate_up = torch.randn(MOST, 2 * 75)
    expect_rows_alone(lambda rows: kernels.rms_norm(x[rows], scale, 1e-6))
    expect_rows_alone(lambda rows: kernels.add_rms_norm(x[rows].clone(), update[rows], scale, 1e-6))
    expect_rows_alone(lambda rows: kernels.silu_mul(gate_up[rows]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_route_and_experts(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    logits, x = torch.randn(MOST, 11), torch.randn(MOST, 40)
    gate_up, down = kernels.pack_experts(torch.randn(10, 2 * 23, 40).to(dtype), torch.randn(10, 40, 23).to(dtype))

    def routed(rows: slice) -> torch.Tensor:
        ids, gates = kernels.route(logits[rows, :10], 3, True)
        return torch.cat(
            [ids, gates, kernels.routed_experts(x[rows], ids, gates, Tree.of(range(10), 4), gate_up, down)], -1
        )

    expect_rows_alone(routed)


def test_shared_gate(kernels: Kernels) -> None:
    torch.manual_seed(4)
    logits, routed, shared = torch.randn(MOST, 9), torch.randn(MOST, 75), torch.randn(MOST, 75)
    expect_rows_alone(lambda rows: kernels.add_shared(routed[rows], shared[rows], logits[rows, 8]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_inputs(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    heads, kv_heads, dim = 4, 2, 24
    norm = QkNorm(torch.randn(dim), torch.randn(dim), 1e-6)
    projected, cos_sin = torch.randn(MOST, 2 * (heads + kv_heads) * dim), torch.randn(MOST, 8)
    pool = KvPool(*torch.zeros(2, MOST, kv_heads, dim).to(dtype), PAGE)
    kv_rows = torch.randperm(MOST).int()

    def written(rows: slice) -> torch.Tensor:
        q = kernels.attention_inputs(projected[rows], cos_sin[rows], norm, pool, kv_rows[rows], heads)
        at = kv_rows[rows].long()
        return torch.cat([q, pool.key_PJD[at], pool.value_PJD[at]], 1)

    expect_rows_alone(written)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 24), (8, 1, 64), (3, 3, 16)])
def test_scanned_attention_is_decoded_attention(
    kernels: Kernels, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    """One run cut into chunks of any size equals its rows decoded alone, whatever is in the call beside them."""
    torch.manual_seed(6)
    width = 2 * (heads + kv_heads) * dim
    pages = 2 * -(-MOST // PAGE)
    pool = KvPool(*torch.randn(2, pages * PAGE, kv_heads, dim).to(dtype), PAGE)
    tables = torch.randperm(pages).int().view(2, -1)
    q, projected = torch.randn(MOST, heads, dim), torch.randn(MOST, width)

    def attend(operation: Callable[..., torch.Tensor], *runs: tuple[int, slice]) -> torch.Tensor:
        rows = torch.cat([torch.arange(run.start, run.stop) for _, run in runs])
        starts = ints([0, *(run.stop - run.start for _, run in runs)]).cumsum(0).int()
        lengths, own = ints(run.start for _, run in runs), tables[[table for table, _ in runs]]
        return operation(q[rows], projected[rows], pool, starts, lengths, own)

    alone = torch.cat([attend(kernels.attention_decode, (0, slice(row, row + 1))) for row in range(MOST)])
    for count in (1, 6, 13, 48, 70, MOST):
        for start in range(0, MOST, count):
            run, beside = slice(start, min(start + count, MOST)), slice(max(0, start - 9), start + 1)
            together = attend(kernels.attention_prefill, (1, beside), (0, run))
            assert torch.equal(together[beside.stop - beside.start :], alone[run]), f"chunks of {count}"
    six = torch.cat([attend(kernels.attention_decode, (0, slice(row, row + 6))) for row in range(0, MOST, 6)])
    assert torch.equal(six, alone)


def test_gated_delta_of_many_sequences(kernels: Kernels) -> None:
    """Decode and prefill of up to 70 sequences, each as it is alone."""
    torch.manual_seed(7)
    groups, heads, key_dim, value_dim, taps, most = 2, 4, 16, 24, 4, 70
    channels, ring = 2 * groups * key_dim + heads * value_dim, ring_entries(1, taps)
    weights = DeltaWeights(
        torch.randn(taps, channels), -torch.rand(heads), torch.randn(heads), torch.randn(value_dim), 1e-6
    )
    shapes = [(heads, key_dim, value_dim), (ring, channels), (ring, groups, key_dim), (ring, heads, value_dim),
              (ring, heads)]  # fmt: skip
    state = DeltaState(*(torch.zeros(2 * most, *shape) for shape in shapes), torch.zeros(2 * most, dtype=torch.int32))
    counts = [1 + 5 * index % 13 for index in range(most)]
    first = ints([0, *counts]).cumsum(0)
    prompts = torch.randn(int(first[-1]), channels + heads * value_dim + 2 * heads)
    rows = torch.randn(most, prompts.shape[1])

    def step(some: slice) -> torch.Tensor:
        indices = range(most)[some]
        own, left = counts[some], ints(index + most for index in indices)
        leaves = Leaves(ints(range(len(own) + 1)), ints(own), left)
        starts, none = (first[some.start : some.stop + 1] - first[some.start]).int(), ints([-1] * len(own))
        part = prompts[first[some.start] : first[some.stop]]
        scanned = kernels.gated_delta_prefill(part, weights, state, starts, ints([0] * len(own)), none, leaves)
        decoded = kernels.gated_delta_decode(rows[some], weights, state, leaves.starts_S1, ints(own), left)
        return torch.cat([scanned, decoded, state.state_SHKV[left].reshape(-1, scanned.shape[1])])

    alone = [step(slice(index, index + 1)) for index in range(most)]
    for count in (2, 3, 7, 32, 64, 70):
        for start in (0, most - count):
            parts = [
                part.split([rows, 1, len(part) - rows - 1])
                for part, rows in zip(alone[start : start + count], counts[start : start + count], strict=True)
            ]
            expected = torch.cat([torch.cat(kind) for kind in zip(*parts, strict=True)])
            assert torch.equal(step(slice(start, start + count)), expected), f"{count} sequences"


def test_it_is_refused_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"deterministic is on.*'auto' on device 'cuda'.*turn deterministic off"):
        select_kernels(torch.device("cuda"), deterministic=True)
    with pytest.raises(ValueError, match="kernels 'reference' on device 'cpu'"):
        select_kernels(torch.device("cpu"), "reference", deterministic=True)
    monkeypatch.setattr(select, "load_library", lambda: None)
    with pytest.raises(ValueError, match=r"install g\+\+ and use device 'cpu'"):
        select_kernels(torch.device("cpu"), deterministic=True)
