"""How near the kernels come to their references, by operation and dtype of the activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from divisi.benchmarks.gpu.cases import DeltaShape, Draw, copied, gated_delta_decode
from divisi.kernels.select import Kernels

_BF16 = 2**-7  # two units in the last place of a result, relative; and for sums that cancel, of the largest terms
TOLERANCE: Mapping[tuple[str, torch.dtype], float] = {
    ("rms_norm", torch.float32): 2e-6,
    ("rms_norm", torch.bfloat16): _BF16,
    ("add_rms_norm", torch.float32): 2e-6,
    ("add_rms_norm", torch.bfloat16): _BF16,
    ("silu_mul", torch.float32): 2e-6,
    ("silu_mul", torch.bfloat16): _BF16,
    ("route", torch.float32): 1e-6,
    ("route", torch.bfloat16): 1e-6,
    ("mixture_inputs", torch.float32): 2e-5,
    ("mixture_inputs", torch.bfloat16): 2 * _BF16,
    ("mixture_add_norm", torch.float32): 2e-5,
    ("mixture_add_norm", torch.bfloat16): 2 * _BF16,  # of experts, and of a sum of them
    ("choose_tokens", torch.float32): 0.0,
    ("choose_tokens", torch.bfloat16): 0.0,
    ("attention_inputs", torch.float32): 2e-5,
    ("attention_inputs", torch.bfloat16): _BF16,
    ("attention_decode", torch.float32): 2e-5,
    ("attention_decode", torch.bfloat16): _BF16,
    ("attention_prefill", torch.float32): 2e-5,
    ("attention_prefill", torch.bfloat16): _BF16,
    ("routed_experts", torch.float32): 2e-5,
    ("routed_experts", torch.bfloat16): 2 * _BF16,  # inner values and parts are rounded too
    ("gated_delta_decode", torch.float32): 5e-5,
    ("gated_delta_decode", torch.bfloat16): _BF16,
    ("gated_delta_flush", torch.float32): 5e-5,
    ("gated_delta_flush", torch.bfloat16): 5e-5,  # the state is fp32 whatever the rows are
    # products of tf32 have 10 bits, and a chunk's inverse adds up to 64 of them; with fp32 rows three products make one
    ("gated_delta_prefill", torch.float32): 2e-4,
    ("gated_delta_prefill", torch.bfloat16): 2 * _BF16,
}
"""Absolute and relative, against the reference in fp32 on the same numbers."""


class WrongResult(ValueError):
    """A kernel's result is not its reference's."""


def expect_close(
    operation: str, dtype: torch.dtype, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float:
    """Return the largest deviation in units of the tolerance; NaN must be where the reference has it.

    Raises WrongResult.
    """
    tolerance, worst = TOLERANCE[operation, dtype], 0.0
    for name, want in expected.items():
        got = actual[name]
        if not want.is_floating_point():
            if not torch.equal(got, want):
                raise WrongResult(f"{operation}: {name} differs in {int((got != want).sum())} of {want.numel()} places")
            continue
        got, want = got.float(), want.float()
        if not torch.equal(got.isnan(), want.isnan()):
            counts = int(got.isnan().sum()), int(want.isnan().sum())
            raise WrongResult(f"{operation}: {name} is NaN in {counts[0]} places, not in the reference's {counts[1]}")
        if want.numel():
            deviation = ((got - want).abs() / (tolerance * (1 + want.abs()))).nan_to_num().max().item()
            worst = max(worst, deviation)
            if deviation > 1:
                raise WrongResult(f"{operation}: {name} deviates by {deviation:.2f} x its tolerance of {tolerance:.1e}")
    return worst


def expect_replay_in_bits(kernels: Kernels, draw: Draw, shape: DeltaShape) -> None:
    """Rows decoded four at a time, one at a time, and replayed must leave the same bits. Raises WrongResult."""
    runs, rows = 3, 4
    case = gated_delta_decode(draw, "replay", shape, [rows] * runs, [0] * runs, rows)
    projected, weights, state, _, lengths_S, slots_S = case.arguments
    each = torch.arange(runs + 1, dtype=torch.int32, device=projected.device)
    last = draw.normal(runs, shape.row)
    states = []
    for at_once in (rows, 1):
        own = copied(state)
        for i in range(0, rows, at_once):
            part = projected.unflatten(0, (runs, rows))[:, i : i + at_once].flatten(0, 1).contiguous()
            kernels.gated_delta_decode(part, weights, own, each * at_once, lengths_S + i, slots_S)
        kernels.gated_delta_decode(last, weights, own, each, lengths_S + rows, slots_S)
        states.append({"state": own.state_SHKV, "delta": own.delta_SRHV, "key": own.key_SRGK})
    bit_equal("gated_delta_decode, 4 rows beside 4 steps", *states)


def bit_equal(operation: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raises WrongResult where two runs differ in a bit, which is a race."""
    for name, one in first.items():
        same = one.contiguous().view(torch.uint8) == second[name].contiguous().view(torch.uint8)
        if not same.all():
            raise WrongResult(f"{operation}: two runs differ in {int((~same).sum())} bytes of {name}")
