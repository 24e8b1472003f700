"""Matrix product, norms, SwiGLU and routing: C++ against the references, odd shapes, poisoned neighbours."""

from __future__ import annotations

import pytest
import torch

from divisi.kernels.experts.layout import Tree
from divisi.kernels.select import Kernels
from divisi.model.placement import Layout, additions
from tests.kernels.conftest import expect_close, packs

WEIGHT_DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(0, 8, 8), (1, 7, 1), (1, 64, 33), (3, 17, 5), (5, 96, 64), (61, 40, 130)]
)
def test_linear(native: Kernels, dtype: torch.dtype, tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(tokens * 1000 + inputs)
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs).to(dtype)
    many = dtype is torch.bfloat16 and tokens >= 48
    if many:
        x = x.bfloat16().float()  # a machine with a bf16 GEMM rounds the activations there, and the products
    rounds = many and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expect_close("rounded linear" if rounds else "linear", native.linear(x, weight), x @ weight.float().T, dtype)


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_linear_row_does_not_depend_on_its_neighbours(native: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(11, 72), torch.randn(29, 72).to(dtype)
    together = native.linear(x, weight)
    for row in range(11):
        assert torch.equal(native.linear(x[row : row + 1], weight)[0], together[row])


@pytest.mark.parametrize(("tokens", "width"), [(0, 16), (1, 1), (2, 61), (19, 256), (80, 4099)])
def test_norms(native: Kernels, reference: Kernels, tokens: int, width: int) -> None:
    torch.manual_seed(2)
    x, update, scale = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width)
    expect_close("norm", native.rms_norm(x, scale, 1e-6), reference.rms_norm(x, scale, 1e-6))
    residuals = x.clone(), x.clone()
    expect_close(
        "norm",
        native.add_rms_norm(residuals[0], update, scale, 1e-6),
        reference.add_rms_norm(residuals[1], update, scale, 1e-6),
    )
    assert torch.equal(residuals[0], residuals[1])


@pytest.mark.parametrize(("tokens", "inner"), [(0, 4), (1, 3), (7, 129), (300, 64)])
def test_silu_mul(native: Kernels, reference: Kernels, tokens: int, inner: int) -> None:
    torch.manual_seed(3)
    gate_up = torch.randn(tokens, 2 * inner) * 10
    expect_close("activation", native.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize(("tokens", "width"), [(9, 61), (80, 4099)])
def test_add_shared(native: Kernels, reference: Kernels, tokens: int, width: int) -> None:
    torch.manual_seed(7)
    logits, routed, shared = torch.randn(tokens, 5) * 10, torch.randn(tokens, width), torch.randn(tokens, width)
    actual = native.add_shared(routed, shared, logits[:, 4])
    expect_close("activation", actual, reference.add_shared(routed, shared, logits[:, 4]))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_mlp(native: Kernels, reference: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    x, gate_up, down = torch.randn(9, 40), torch.randn(46, 40) / 6, torch.randn(40, 23) / 5
    x, gate_up, down = (values.to(dtype).float() for values in (x, gate_up, down))
    packed = native.pack_mlp(gate_up.to(dtype), down.to(dtype))
    rounds = packs(native) and dtype is torch.bfloat16
    actual, expected = native.mlp(x, *packed), reference.mlp(x, gate_up, down)
    torch.testing.assert_close(actual, expected, atol=2e-2 if rounds else 2e-5, rtol=0)


def test_silu_mul_extremes(native: Kernels) -> None:
    gate_up = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(native.silu_mul(gate_up), torch.tensor([[0.0, 0.0, 0.0, 100.0]]), atol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"), [(0, 4, 2), (1, 1, 1), (9, 7, 7), (40, 512, 10), (100, 45, 8)]
)
def test_route(native: Kernels, reference: Kernels, normalise: bool, tokens: int, experts: int, chosen: int) -> None:
    torch.manual_seed(4)
    logits = torch.randn(tokens, experts + 3)[:, :experts]  # a view, as where the shared gate's logit sits beside
    ids, gates = native.route(logits, chosen, normalise)
    expected_ids, expected_gates = reference.route(logits, chosen, normalise)
    assert ids.dtype is torch.int32
    assert torch.equal(ids, expected_ids)
    expect_close("router", gates, expected_gates)


def test_route_breaks_ties_by_the_lowest_id(kernels: Kernels) -> None:
    torch.manual_seed(5)
    logits = torch.randn(30, 512).round()
    ids, _ = kernels.route(logits, 10, True)
    assert ids.tolist() == [sorted(range(512), key=lambda e: (-row[e], e))[:10] for row in logits.tolist()]
    ids, gates = kernels.route(torch.zeros(1, 8), 3, True)
    assert ids.tolist() == [[0, 1, 2]]
    assert torch.allclose(gates, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(("tokens", "chosen", "experts"), [(0, 2, 3), (1, 1, 1), (1, 4, 8), (17, 3, 5), (130, 2, 4)])
def test_experts_match_a_dense_sum(
    kernels: Kernels, reference: Kernels, dtype: torch.dtype, tokens: int, chosen: int, experts: int
) -> None:
    torch.manual_seed(5)
    width, inner = 40, 23
    x = torch.randn(tokens, width).bfloat16().float()
    weights = torch.randn(experts, 2 * inner, width) / 6, torch.randn(experts, width, inner) / 6
    gate_up, down = (w.to(dtype) for w in weights)
    ids = (
        torch.stack([torch.randperm(experts + 2)[:chosen] for _ in range(tokens)]) if tokens else torch.empty(0, chosen)
    )
    ids = torch.where(ids >= experts, -1, ids).to(torch.int32)
    gates = torch.rand(tokens, chosen)
    actual = kernels.routed_experts(x, ids, gates, Tree.of(range(experts), 4), gate_up, down)
    expected = torch.zeros(tokens, width)
    for token in range(tokens):
        for choice in range(chosen):
            expert = int(ids[token, choice])
            if expert >= 0:
                gate, up = (gate_up[expert].float() @ x[token]).chunk(2)
                expected[token] += gates[token, choice] * (down[expert].float() @ (torch.nn.functional.silu(gate) * up))
    if dtype is torch.bfloat16 and kernels.routed_experts is reference.routed_experts:
        torch.testing.assert_close(actual, expected, atol=3e-2, rtol=3e-2)  # the reference rounds between its products
    else:
        expect_close("experts", actual, expected, dtype)


def test_all_tokens_to_one_expert_and_poisoned_strangers(native: Kernels) -> None:
    torch.manual_seed(6)
    gate_up, down = torch.full((3, 16, 8), torch.nan), torch.full((3, 8, 8), torch.nan)
    gate_up[1], down[1] = torch.randn(16, 8), torch.randn(8, 8)
    ids = torch.ones((50, 1), dtype=torch.int32)
    actual = native.routed_experts(
        torch.randn(50, 8), ids, torch.ones(50, 1), Tree.of(range(len(down)), 2), gate_up, down
    )
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("leaves", [1, 4, 7, 32])
def test_subtrees_of_experts_add_up_to_the_whole_bit_for_bit(kernels: Kernels, dtype: torch.dtype, leaves: int) -> None:
    """However many shards serve them: each sums the experts of its own leaves, and their sums are added in the tree."""
    torch.manual_seed(6)
    tokens, chosen, experts, width, inner = 37, 6, 32, 144, 24
    x, gates = torch.randn(tokens, width), torch.rand(tokens, chosen)
    gate_up, down = torch.randn(experts, 2 * inner, width).to(dtype), torch.randn(experts, width, inner).to(dtype)
    ids = torch.stack([torch.randperm(experts)[:chosen] for _ in range(tokens)]).int()
    whole = kernels.routed_experts(x, ids, gates, Tree.of(range(experts), leaves), gate_up, down)
    for shards in {1, 2, 3, 4, leaves} & set(range(1, leaves + 1)):
        layout = Layout.even(leaves, shards)
        trees = [tree for seat in layout.seats for tree in layout.subtrees(seat)]
        sums = []
        for own in trees:
            held = [e for e in range(experts) if e % leaves in own]
            local = torch.full((experts,), -1, dtype=torch.int32)
            local[held] = torch.arange(len(held), dtype=torch.int32)
            weights = gate_up[held].contiguous(), down[held].contiguous()
            sums.append(kernels.routed_experts(x, local[ids], gates, Tree.of(held, leaves), *weights))
        for left, right in additions(trees):
            sums[left] += sums[right]
        assert torch.equal(sums[0], whole), f"{shards} shards"
