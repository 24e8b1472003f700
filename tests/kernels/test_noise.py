from __future__ import annotations

import numpy as np
import pytest
import torch

from divisi.kernels.sampling.noise import gumbel_noise, row_keys

MASK_32, MASK_64 = (1 << 32) - 1, (1 << 64) - 1


def _splitmix64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def _lowbias32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK_32
    return x ^ (x >> 16)


def exact_noise(seed: int, position: int, token: int) -> float:
    """The definition, in Python's unbounded integers and, but for the rounding that it tells, fp64."""
    key = _splitmix64((seed + 0x9E3779B97F4A7C15) & MASK_64)
    key = _splitmix64(key ^ (((position + 1) * 0xD1B54A32D192ED03) & MASK_64))
    bits = _lowbias32(_lowbias32(token ^ (key & MASK_32)) ^ (key >> 32)) & (MASK_32 >> 1)
    uniform = min(float(np.float32(bits) + np.float32(0.5)) * 2.0**-31, 1 - 2.0**-24)
    return float(-np.log(-np.log1p(-uniform)))


def noise(seeds: list[int], positions: list[int], vocab: int) -> torch.Tensor:
    keys = row_keys(np.array(seeds, dtype=np.uint64), np.array(positions, dtype=np.int64))
    return gumbel_noise(torch.from_numpy(keys), torch.arange(vocab, dtype=torch.int32))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 1, 262_143])
def test_is_the_function_that_it_says(seed: int, position: int) -> None:
    found = noise([seed], [position], 200)[0]
    expected = [exact_noise(seed, position, token) for token in range(200)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=2e-6)


def test_is_finite_at_both_ends() -> None:
    values = noise([3], [5], 2_000_000)
    assert torch.isfinite(values).all()
    assert values.min() >= -2.9
    assert values.max() <= 22.2


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
def test_moments_and_independence_along_each_argument(axis: str) -> None:
    count = 200_000
    if axis == "token":
        values = noise([11], [7], count)[0].double()
    else:
        varying, fixed = list(range(count)), [7] * count
        values = noise(*((varying, fixed) if axis == "seed" else (fixed, varying)), 1)[:, 0].double()
    sigma = np.pi / np.sqrt(6)
    assert abs(values.mean().item() - np.euler_gamma) < 5 * sigma / np.sqrt(count)
    assert abs(values.std().item() - sigma) < 0.02
    uniform = torch.exp(-torch.exp(-values))
    for lag in (1, 2, 4, 16, 256, 65_536):
        correlation = torch.corrcoef(torch.stack([uniform[:-lag], uniform[lag:]]))[0, 1].item()
        assert abs(correlation) < 5 / np.sqrt(count - lag), lag
