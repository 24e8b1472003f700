"""Drawing tokens in C++: the reference's noise and the reference's tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from divisi.kernels.native.loader import load_library
from divisi.kernels.sampling.layout import Draw, Draws
from divisi.kernels.sampling.noise import gumbel_noise, row_keys
from divisi.kernels.sampling.reference import choose_tokens
from divisi.kernels.select import Kernels, select_kernels
from tests.kernels.conftest import BUILDS

ULPS = 2


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def native(build: str) -> Kernels:
    return select_kernels(torch.device("cpu"), build)


def ulp(values: Tensor) -> Tensor:
    """Of fp32 values, and of 1 for smaller ones: the logarithm of what has been rounded is no finer."""
    return torch.from_numpy(np.spacing(values.abs().clamp(min=1.0).numpy()))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (3, 5), (2**63 + 11, 262_143), (2**64 - 1, 2**40)])
def test_noise_is_the_reference_s(build: str, seed: int, position: int) -> None:
    """A hash that differs in one bit would be nowhere near."""
    library, vocab = load_library(build), 400_000
    assert library is not None
    seeds, positions = np.array([seed], dtype=np.uint64), np.array([position], dtype=np.int64)
    found = torch.empty(1, vocab)
    library.functions.divisi_noise(seeds.ctypes.data, positions.ctypes.data, found.data_ptr(), 1, vocab)
    keys = torch.from_numpy(row_keys(seeds, positions))
    expected = gumbel_noise(keys, torch.arange(vocab, dtype=torch.int32))
    assert ((found - expected).abs() <= ULPS * ulp(expected)).all()


def some_draw(rng: random.Random) -> Draw:
    return Draw(
        rng.randrange(2**64),
        rng.choice([0.0, 1e-40, 0.3, 0.7, 1.0, 1.0, 2.0]),
        rng.choice([0, 0, 1, 5, 40, 10**6]),
        rng.choice([1.0, 1.0, 0.95, 0.5, 1e-9]),
        rng.choice([0.0, 0.0, 0.0, 0.05, 0.3]),
    )


def differing(native: Kernels, logits_RV: Tensor, draws: list[Draw], positions_R: np.ndarray) -> int:
    """Rows with another token than the reference's, each of which must be as good as a tie."""
    packed = Draws(draws)
    actual, expected = (choose(logits_RV, packed, positions_R) for choose in (native.choose_tokens, choose_tokens))
    rows = (actual != expected).nonzero()[:, 0]
    for row in rows.tolist():
        keys = torch.from_numpy(row_keys(packed.seeds_R[row : row + 1], positions_R[row : row + 1]))
        scaled_V = (logits_RV[row] - logits_RV[row].max()) / draws[row].temperature
        noise_V = gumbel_noise(keys, torch.arange(logits_RV.shape[1], dtype=torch.int32))[0]
        one, other = (scaled_V + noise_V)[[actual[row], expected[row]]]
        largest = torch.stack([scaled_V, noise_V]).abs().amax(0)[[actual[row], expected[row]]].max()
        assert abs(one - other) <= 2 * ULPS * ulp(largest), (row, draws[row], actual[row], expected[row])
    return len(rows)


@pytest.mark.timeout(900)
def test_the_reference_s_tokens(
    build: str, native: Kernels, full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    rows, rng, found = 1_000_000 if full_tier else 8_000, random.Random(22), 0
    generator = torch.Generator().manual_seed(22)
    print("seed 22")
    at_once = 2000
    for first in range(0, rows, at_once):
        vocab = (7, 50, 300, 1500)[first // at_once % 4]
        logits_RV = torch.randn(at_once, vocab, generator=generator) * rng.choice([0.3, 2.0, 8.0])
        positions_R = np.arange(first, first + at_once, dtype=np.int64)
        found += differing(native, logits_RV, [some_draw(rng) for _ in range(at_once)], positions_R)
    record_result(f"{build}: rows with another token, as good as ties", f"{found} of {rows}")
    assert found <= 1 + rows // 10_000


@pytest.mark.parametrize("vocab", [1, 2, 511, 513, 20_011])
def test_odd_sizes_and_what_is_left_out(native: Kernels, vocab: int) -> None:
    """Rows that lie apart, tokens that rules excluded, equal logits."""
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    logits_RV = torch.randn(12, vocab + 3, generator=generator)[:, :vocab]
    logits_RV[::3] = logits_RV[::3].round()  # many ties
    logits_RV[1, 1:] = -torch.inf
    logits_RV[2, torch.rand(vocab, generator=generator) < 0.5] = -torch.inf
    logits_RV[2, -1] = 0.0
    draws = [some_draw(rng) for _ in range(12)]
    for _ in range(5):
        assert differing(native, logits_RV, draws, np.full(12, rng.randrange(1000), dtype=np.int64)) == 0
        rng.shuffle(draws)


def test_the_lowest_of_equal_tokens_is_the_best(native: Kernels) -> None:
    logits_RV = torch.zeros(2, 1300)
    logits_RV[1, [700, 1250]] = 1.0
    draws = Draws([Draw(1, 0.0), Draw(1, 0.0)])
    assert native.choose_tokens(logits_RV, draws, np.zeros(2, dtype=np.int64)).tolist() == [0, 700]


def test_a_row_s_token_is_its_own(native: Kernels) -> None:
    """Whatever rows are beside it."""
    rng, logits_RV = random.Random(9), torch.randn(40, 3000, generator=torch.Generator().manual_seed(9))
    draws, positions_R = [some_draw(rng) for _ in range(40)], np.arange(40, dtype=np.int64)
    together = native.choose_tokens(logits_RV, Draws(draws), positions_R)
    for row in range(40):
        one = slice(row, row + 1)
        assert native.choose_tokens(logits_RV[one], Draws(draws[one]), positions_R[one]) == together[row]
