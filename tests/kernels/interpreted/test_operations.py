"""Every Triton kernel against its reference in fp32, over the programs in three orders."""

from __future__ import annotations

import pytest
import torch

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import DeltaShape, Draw
from divisi.benchmarks.gpu.check import WrongResult, expect_close, expect_replay_in_bits
from divisi.benchmarks.gpu.shapes import CHECKED, ODD_DELTA, SMALL_DELTA
from divisi.kernels.experts.layout import Tree
from divisi.kernels.experts.reference import sum_in_tree
from divisi.kernels.experts.triton_sum import sum_parts
from divisi.kernels.gated_delta import triton_decode
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.mixture.layout import ExpertParts
from divisi.kernels.pass_memory import TorchMemory
from divisi.kernels.select import assembled, select_kernels
from tests.support.honest_interpreter import grid_order, planted

CPU = torch.device("cpu")
TRITON = assembled({"triton": triton_operations(Chip.H100)}, "triton")
ORDERS = ("forward", "reverse", "shuffled")
DTYPES = (torch.float32, torch.bfloat16)


def runs() -> list[object]:
    """Every case once in the quick tier, dtypes and orders by turns; in the full tier all of them."""
    found = []
    for i, name in enumerate(CHECKED):
        for dtype in DTYPES:
            for order in ORDERS:
                quick = dtype is DTYPES[i % 5 != 0] and order == ORDERS[i % 3]
                found.append(pytest.param(name, dtype, order, marks=() if quick else pytest.mark.verify))
    return found


@pytest.mark.parametrize(("name", "dtype", "order"), runs())
def test_equals_the_reference(name: str, dtype: torch.dtype, order: str) -> None:
    case = CHECKED[name](Draw(len(name), dtype, CPU), name)
    reference = case.mapped(cases.exact).run(select_kernels(CPU, "reference"))
    with grid_order(order):
        actual = case.run(TRITON)
    expect_close(case.operation, dtype, actual, reference)


@pytest.mark.parametrize(("leaves", "tokens", "chosen"), [(1, 2, 3), (2, 3, 3), (8, 6, 5), (32, 12, 10), (512, 3, 10)])
def test_experts_are_summed_in_the_trees_order(leaves: int, tokens: int, chosen: int) -> None:
    """Bit for bit; of choices held elsewhere the parts are poison."""
    draw, experts = Draw(leaves, torch.bfloat16, CPU), max(leaves, 16)
    tree = Tree.of(range(experts), leaves)
    ids = torch.stack([draw.order(experts + 9)[:chosen] for _ in range(tokens)])
    ids[0] = experts
    ids = torch.where(ids < experts, ids, -1).int()
    parts, gates = draw.normal(tokens, chosen, 40), draw.uniform(tokens, chosen)
    parts[ids < 0] = torch.nan
    found = sum_parts(ExpertParts(parts.flatten(0, 1), ids, gates, tree), TorchMemory())
    terms = torch.where((ids < 0)[..., None], 0.0, parts.float() * gates[..., None])
    assert torch.equal(found, sum_in_tree(terms, tree.leaves_E[ids.clamp(min=0)], tree.size))


@pytest.mark.parametrize("shape", [SMALL_DELTA, pytest.param(ODD_DELTA, marks=pytest.mark.verify)])
def test_replay_leaves_the_bits_of_the_first_run(shape: DeltaShape) -> None:
    expect_replay_in_bits(TRITON, Draw(0, torch.bfloat16, CPU), shape)


def test_rows_that_no_sequence_owns_are_zero() -> None:
    draw = Draw(1, torch.bfloat16, CPU)
    projected, weights, state, starts, lengths, slots = cases.gated_delta_decode(
        draw, "", SMALL_DELTA, [1, 1], [1, 0], 1
    ).arguments
    padded = torch.cat([projected, torch.full_like(projected, torch.nan)])
    out = TRITON.gated_delta_decode(padded, weights, state, starts, lengths, slots)
    assert out[:2].isfinite().all()
    assert not out[2:].any()
    q, rows, pool, starts, lengths, pages = cases.attention(
        draw, "", "attention_decode", cases.Heads(2, 1, 16, 8, 4), [5, 0], [1, 1]
    ).arguments
    padded_q, padded_rows = (torch.cat([x, torch.full_like(x, torch.nan)]) for x in (q, rows))
    out = TRITON.attention_decode(padded_q, padded_rows, pool, starts, lengths, pages)
    assert out[:2].isfinite().all()
    assert not out[2:].any()


def test_a_position_that_is_stored_too_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted race that the module was built around: other programs of the sequence find nothing to replay."""
    wrong = planted(
        triton_decode,
        "gated_delta_decode_fwd_kernel",
        "            tl.store(p_own, b_s, mask=mask)\n",
        "            tl.store(p_own, b_s, mask=mask)\n            tl.store(p_position + slot, length)\n",
    )
    monkeypatch.setattr(triton_decode, "gated_delta_decode_fwd_kernel", wrong)
    case = CHECKED["delta decode"](Draw(0, torch.float32, CPU), "")
    with pytest.raises(WrongResult, match="deviates"):
        expect_close(case.operation, torch.float32, case.run(TRITON), case.run(select_kernels(CPU, "reference")))


def test_a_state_that_is_rounded_to_bf16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = planted(
        triton_decode,
        "gated_delta_decode_fwd_kernel",
        "            b_sg = b_s * g\n",
        "            b_sg = (b_s * g).to(tl.bfloat16).to(tl.float32)\n",
    )
    monkeypatch.setattr(triton_decode, "gated_delta_decode_fwd_kernel", wrong)
    case = CHECKED["delta decode"](Draw(0, torch.float32, CPU), "")
    with pytest.raises(WrongResult, match="deviates"):
        expect_close(case.operation, torch.float32, case.run(TRITON), case.run(select_kernels(CPU, "reference")))
