"""The choice of implementation, operation by operation."""

from __future__ import annotations

import pytest
import torch

from divisi.kernels.choice import OPERATIONS
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
