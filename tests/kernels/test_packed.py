"""Packed bf16 weights: the layout, products against the same in fp32, and each row's bits whatever is beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from divisi.kernels.attention.layout import KvPool
from divisi.kernels.experts.layout import Tree
from divisi.kernels.linear.layout import PackedMatrix, restacked
from divisi.kernels.native.variants import VARIANTS, runnable_variants
from divisi.kernels.select import Kernels, select_kernels

from .conftest import expect_close

BUILDS = [variant.name for variant in VARIANTS.values() if variant.bf16]
pytestmark = pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(VARIANTS[name] not in runnable_variants(), reason=f"it cannot run {name}")
        )
        for name in BUILDS
    ],
    scope="module",
)
MOST = 300
FEW = [*range(1, 15), 47, 48, 49, 64, 239, 241, MOST]


@pytest.fixture(scope="module")
def kernels(two_threads: None, build: str) -> Kernels:
    return select_kernels(torch.device("cpu"), build)


def rounded(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 2), (33, 7), (65, 64), (130, 41), (200, 96)])
def test_linear(kernels: Kernels, outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs)
    weight = rounded(outputs, inputs)
    packed = kernels.pack_linear(weight)
    assert isinstance(packed, PackedMatrix)
    assert torch.equal(kernels.embed(packed, torch.arange(outputs).flip(0)), weight.flip(0).float())
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 300):
        x = rounded(tokens, inputs).float()
        torch.testing.assert_close(kernels.linear(x, packed), x @ weight.float().T, atol=2e-5, rtol=2e-5)


def test_inputs_are_rounded_to_nearest_even(kernels: Kernels) -> None:
    x = torch.randn(3, 50)
    packed = kernels.pack_linear(torch.eye(50).bfloat16())
    assert torch.equal(kernels.linear(x, packed), x.bfloat16().float())


def test_weights_take_no_more_than_their_blocks(kernels: Kernels) -> None:
    whole, odd = kernels.pack_linear(rounded(64, 128)), kernels.pack_linear(rounded(65, 127))
    assert whole.nbytes == 2 * 64 * 128
    assert odd.nbytes == 2 * 80 * 128


@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "width", "inner"),
    [
        (0, 2, 3, 40, 23),
        (1, 1, 1, 8, 16),
        (1, 4, 8, 40, 23),
        (17, 3, 5, 64, 32),
        (130, 2, 4, 70, 33),
        (700, 8, 16, 48, 64),
    ],
)
def test_experts(kernels: Kernels, tokens: int, chosen: int, experts: int, width: int, inner: int) -> None:
    """Against fp32 sums of the same rounded inputs, the inner activations rounded too."""
    torch.manual_seed(tokens)
    x, gate_up, down = (
        rounded(tokens, width).float(),
        rounded(experts, 2 * inner, width),
        rounded(experts, width, inner),
    )
    ids = torch.rand(tokens, experts + 2).argsort(-1)[:, :chosen]
    ids, gates = torch.where(ids < experts, ids, -1).int(), torch.rand(tokens, chosen)
    actual = kernels.routed_experts(x, ids, gates, Tree.of(range(experts), 4), *kernels.pack_experts(gate_up, down))
    gate_TEI, up_TEI = torch.einsum("td,efd->tef", x, gate_up.float()).chunk(2, -1)
    inner_TEI = (torch.nn.functional.silu(gate_TEI) * up_TEI).bfloat16().float()
    outputs_TED = torch.einsum("tei,edi->ted", inner_TEI, down.float())
    weight_TE = torch.zeros(tokens, experts + 1).index_put_((torch.arange(tokens)[:, None], ids.long()), gates)
    expected = torch.einsum("ted,te->td", outputs_TED, weight_TE[:, :experts])
    scale = outputs_TED.abs().max() if tokens else torch.tensor(1.0)
    torch.testing.assert_close(actual / scale, expected / scale, atol=2**-8, rtol=0)  # one activation a step apart


def test_stacks_of_experts_are_cut_and_joined_as_they_lie(kernels: Kernels) -> None:
    """Those of two stacks put together are packed as one stack of them would be."""
    torch.manual_seed(3)
    gate_up, down = rounded(6, 2 * 23, 40), rounded(6, 40, 23)
    first, second = (kernels.pack_experts(gate_up[part], down[part]) for part in (slice(4), slice(4, 6)))
    wanted = kernels.pack_experts(gate_up[[5, 3, 0]].contiguous(), down[[5, 3, 0]].contiguous())
    for pair, whole in zip(zip(first, second, strict=True), wanted, strict=True):
        joined = restacked(pair, [(1, 1), (0, 3), (0, 0)])
        assert isinstance(joined, PackedMatrix)
        assert isinstance(whole, PackedMatrix)
        assert torch.equal(joined.data, whole.data)


def test_a_token_may_choose_an_expert_twice(kernels: Kernels) -> None:
    torch.manual_seed(4)
    x, packed = rounded(20, 40).float(), kernels.pack_experts(rounded(3, 32, 40), rounded(3, 40, 16))
    ids, gates = torch.tensor([[0, 0], [1, 2], [0, 1], *[[2, 1]] * 17]).int(), torch.rand(20, 2)

    def routed(rows: slice) -> torch.Tensor:
        return kernels.routed_experts(x[rows], ids[rows], gates[rows], Tree.of([0, 1, 2], 4), *packed)

    assert torch.equal(routed(slice(20)), torch.cat([routed(slice(row, row + 1)) for row in range(20)]))


def test_what_is_too_small_for_a_float_is_so_in_any_company(kernels: Kernels) -> None:
    torch.manual_seed(6)
    x, packed = torch.randn(9, 96) * 1e-19, kernels.pack_linear(rounded(64, 96) * 2**-64)
    together = kernels.linear(x, packed)
    assert torch.equal(together, torch.cat([kernels.linear(x[row : row + 1], packed) for row in range(9)]))


def test_products_of_torch_in_between_change_nothing(kernels: Kernels) -> None:
    """Its own lay out the registers of AMX otherwise."""
    torch.manual_seed(5)
    x, packed, other = torch.randn(70, 96), kernels.pack_linear(rounded(130, 96)), rounded(300, 300)
    before = kernels.linear(x, packed)
    for _ in range(3):
        torch.nn.functional.linear(other[:, :250], other[:50, :250])
        assert torch.equal(kernels.linear(x, packed), before)


@pytest.mark.parametrize("dim", [16, 48, 80, 128, 256])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_attention_of_other_heads(kernels: Kernels, reference: Kernels, dim: int, rows: int) -> None:
    torch.manual_seed(dim)
    kv_heads, heads, length = 3, 6, 100
    pool = KvPool(rounded(112, kv_heads, dim), rounded(112, kv_heads, dim), 16)
    q, projected = torch.randn(rows, heads, dim), torch.randn(rows, 2 * (heads + kv_heads) * dim)
    starts, lengths = torch.tensor([0, rows]).int(), torch.tensor([length - rows]).int()
    table = torch.randperm(7).int()[None]
    found, expected = (
        (each.attention_prefill if rows > 7 else each.attention_decode)(q, projected, pool, starts, lengths, table)
        for each in (kernels, reference)
    )
    expect_close("tiled attention", found, expected, torch.bfloat16)


def test_strangers_are_not_read(kernels: Kernels) -> None:
    gate_up, down = torch.full((3, 32, 8), torch.nan), torch.full((3, 8, 16), torch.nan)
    gate_up[1], down[1] = torch.randn(32, 8), torch.randn(8, 16)
    packed = kernels.pack_experts(gate_up.bfloat16(), down.bfloat16())
    ids = torch.ones((50, 1), dtype=torch.int32)
    assert torch.isfinite(
        kernels.routed_experts(torch.randn(50, 8), ids, torch.ones(50, 1), Tree.of(range(3), 2), *packed)
    ).all()


def expect_rows_alone(operation: Callable[[slice], torch.Tensor], counts: list[int]) -> None:
    alone = torch.cat([operation(slice(row, row + 1)) for row in range(MOST)])
    for count in counts:
        for rows in (slice(0, count), slice(MOST - count, MOST)):
            assert torch.equal(operation(rows), alone[rows]), f"{count} rows"


def check_bits(kernels: Kernels, counts: list[int]) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(MOST, 128), kernels.pack_linear(rounded(145, 128))
    expect_rows_alone(lambda rows: kernels.linear(x[rows], weight), counts)
    packed = kernels.pack_experts(rounded(10, 2 * 40, 128), rounded(10, 128, 40))
    ids, gates, tree = torch.rand(MOST, 10).argsort(-1)[:, :3].int(), torch.rand(MOST, 3), Tree.of(range(10), 4)
    expect_rows_alone(lambda rows: kernels.routed_experts(x[rows], ids[rows], gates[rows], tree, *packed), counts)
    heads, kv_heads, dim, page, before = 8, 2, 32, 16, 500
    pool = KvPool(rounded(1600, kv_heads, dim), rounded(1600, kv_heads, dim), page)
    q, projected = torch.randn(MOST, heads, dim), torch.randn(MOST, 2 * (heads + kv_heads) * dim)
    table = torch.randperm(100).int()[None]

    def attend(rows: slice) -> torch.Tensor:
        starts, length = torch.tensor([0, rows.stop - rows.start]).int(), torch.tensor([before + rows.start]).int()
        kind = kernels.attention_prefill if rows.stop - rows.start > 1 else kernels.attention_decode
        return kind(q[rows], projected[rows], pool, starts, length, table)

    expect_rows_alone(attend, counts)


def test_rows_have_the_bits_that_they_have_alone(kernels: Kernels) -> None:
    """Without `deterministic`. The rows attend across a span's end: some begin in one span, all end in another."""
    check_bits(kernels, FEW)


@pytest.mark.verify
@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_have_them_for_all_counts(two_threads: None, build: str, deterministic: bool) -> None:
    check_bits(select_kernels(torch.device("cpu"), build, deterministic=deterministic), [*range(1, MOST + 1)])


@pytest.mark.parametrize(("kv_heads", "length"), [(2, 2999), (4, 400), (4, 800), (3, 400), (1, 400)])
def test_contexts_have_the_same_bits_on_any_number_of_threads(kernels: Kernels, kv_heads: int, length: int) -> None:
    """Long ones are cut into spans; heads are shared out where there are fewer spans than threads."""
    torch.manual_seed(2)
    pool, heads = KvPool(rounded(3008, kv_heads, 64), rounded(3008, kv_heads, 64), 16), 4 * kv_heads
    q, projected = torch.randn(6, heads, 64), torch.randn(6, 2 * (heads + kv_heads) * 64)
    table = torch.randperm(188).int()[None]

    def attend() -> torch.Tensor:
        starts, lengths = torch.tensor([0, 6]).int(), torch.tensor([length]).int()
        return kernels.attention_decode(q, projected, pool, starts, lengths, table)

    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(attend())
    torch.set_num_threads(2)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
