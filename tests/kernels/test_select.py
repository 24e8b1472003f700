"""The choice of implementation, operation by operation."""

from __future__ import annotations

import pytest
import torch

from divisi.kernels.choice import OPERATIONS
from divisi.kernels.gpu.chip import Chip
from divisi.kernels.gpu.ops import triton_operations
from divisi.kernels.linear.layout import Format, PackedMatrix, StoredMatrix, plain_rows
from divisi.kernels.router.reference import route
from divisi.kernels.select import select_kernels

CPU = torch.device("cpu")


def test_every_operation_is_there_whatever_is_chosen() -> None:
    for choice in ("auto", "reference", "native"):
        kernels = select_kernels(CPU, choice)
        assert all(callable(getattr(kernels, operation)) for operation in OPERATIONS)


def test_one_operation_may_differ_from_the_rest() -> None:
    kernels = select_kernels(CPU, "native, route=reference")
    assert kernels.route is route
    assert kernels.linear is not select_kernels(CPU, "reference").linear
    assert select_kernels(CPU, "reference,route=native").route is not route


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("fast", "'fast' are unknown; use 'auto'"),
        ("rout=reference", "operation 'rout' is unknown; use one of linear,"),
        ("route=fast", "'fast' are unknown"),
        ("triton", "need an NVIDIA A100, H100, B200"),
        ("route=triton", "need an NVIDIA A100, H100, B200"),
    ],
)
def test_a_wrong_choice_says_what_is_right(choice: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        select_kernels(CPU, choice)


@pytest.mark.parametrize("choice", ["reference", "native,route=reference"])
def test_deterministic_is_all_or_nothing(choice: str) -> None:
    with pytest.raises(ValueError, match="deterministic is on"):
        select_kernels(CPU, choice, deterministic=True)


def test_a_gpus_weights_carry_their_format() -> None:
    table = triton_operations(Chip.H100)
    weight = torch.randn(5, 16)
    (stored, _), alone = table["pack_experts"](weight[None], weight[None]), table["pack_linear"](weight)
    assert (alone.format, alone.scales, alone.nbytes) == (Format.PLAIN, None, weight.nbytes)
    assert torch.equal(plain_rows(stored), weight[None])
    x = torch.randn(3, 16)
    assert torch.equal(table["linear"](x, alone), x @ weight.T)
    scaled = StoredMatrix(weight.to(torch.int8), Format.PLAIN, torch.ones(5))
    assert scaled.nbytes == weight.numel() + 20


def test_weights_in_a_format_that_a_kernel_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="row by row got a matrix in format 'packed'"):
        triton_operations(Chip.H100)["linear"](torch.zeros(1, 16), PackedMatrix(torch.zeros(16 * 16), 16, 16))
