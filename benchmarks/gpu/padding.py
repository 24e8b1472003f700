"""Decode steps that are laid out for a bucket: padding changes no bit of anybody's, and what comes of it is zero."""

from __future__ import annotations

from dataclasses import replace

import torch

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import Case, Draw
from divisi.benchmarks.gpu.check import WrongResult, bit_equal
from divisi.benchmarks.gpu.shapes import ODD_DELTA, SMALL_DELTA, SMALL_HEADS
from divisi.kernels.select import Kernels

ADDED = ((0, 1), (3, 0), (1, 2))
"""Rows that no sequence owns, and sequences of slot -1 without rows."""


def padded_cases(draw: Draw) -> list[Case]:
    """Of the operations that know sequences."""
    return [
        cases.gated_delta_decode(draw, "one row", SMALL_DELTA, [1, 1, 1], [1, 0, 1], 1),
        cases.gated_delta_decode(draw, "ragged", ODD_DELTA, [3, 1], [2, 0], 4),
        cases.attention(draw, "ragged", "attention_decode", SMALL_HEADS, [5, 0, 37], [1, 1, 2]),
    ]


def padded(case: Case, rows: int, sequences: int) -> Case:
    """The same with so many more of each, after its own: rows are NaN, lengths and pages those of somebody."""
    arguments, attends = list(case.arguments), case.operation == "attention_decode"
    for i in (0, 1) if attends else (0,):
        x = arguments[i]
        arguments[i] = torch.cat([x, torch.full_like(x[:1], torch.nan).expand(rows, *x.shape[1:])])
    starts, lengths, last = arguments[3:6]
    arguments[3] = torch.cat([starts, starts[-1:].expand(sequences)])
    arguments[4] = torch.cat([lengths, lengths.new_full((sequences,), 9)])
    arguments[5] = torch.cat([last, last.new_full((sequences, *last.shape[1:]), 0 if attends else -1)])
    return replace(case, arguments=tuple(arguments))


def expect_padding_to_be_nobodys(kernels: Kernels, case: Case, rows: int, sequences: int) -> None:
    """Raises WrongResult."""
    exact, found = case.run(kernels), padded(case, rows, sequences).run(kernels)
    out, owned = found["result0"], len(exact["result0"])
    if len(out) != owned + rows or out[owned:].any():
        raise WrongResult(f"{case.operation}: {rows} rows of padding do not give as many rows of zeros")
    found["result0"] = out[:owned]
    bit_equal(f"{case.operation} ({case.name}) beside {rows} rows and {sequences} sequences more", exact, found)
