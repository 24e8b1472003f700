"""Counter-based noise: a number for each (seed, position, token id), the same on any device, in any batch.

Shapes: R rows, V token ids.

Why this hash. The noise must be a pure function of its three arguments, cheap over a whole vocabulary, and exact on
every device. Philox-4x32-10, the usual choice, needs ten rounds of 32 x 32 -> 64 bit products, which PyTorch can only
do in int64 (not vectorised below AVX-512) and in about three times as many passes over memory. So the work is divided:
(seed, position) is hashed once per row to a 64-bit key by two rounds of splitmix64's finaliser (Steele et al. 2014),
and per token id two rounds of lowbias32 (C. Wellons, hash-prospector) are keyed with its halves. All per-token
arithmetic is int32 with wrap-around: products modulo 2**32, and right shifts masked to be logical.

From the hash to noise: 31 bits make v = (bits + 1/2) / 2**31 in (0, 1), rounded to fp32 and kept below 1; then
E = -log1p(-v) is exponentially distributed and -log E is Gumbel. Small v, which win, keep all their bits, so that
even V equal tokens tie with probability about V / 2**31; -log(-log u), more common, loses them to rounding near u = 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_MASK_31 = 0x7FFF_FFFF
_BELOW_ONE = 1.0 - 2.0**-24


def row_keys(seeds_R: NDArray[np.uint64], positions_R: NDArray[np.int64]) -> NDArray[np.int32]:
    """Hash each row's (seed, position) to a key: int32 [R, 2]."""
    hashed_R = _splitmix64(seeds_R + np.uint64(0x9E37_79B9_7F4A_7C15))
    counter_R = (positions_R.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD1B5_4A32_D192_ED03)
    return _splitmix64(hashed_R ^ counter_R).view(np.int32).reshape(-1, 2)


def gumbel_noise(keys_R2: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise, fp32, of each row's key (int32 [R, 2]) and token id (int32 [V] or [R, V]): [R, V]."""
    bits_RV = token_ids ^ keys_R2[:, :1]
    _lowbias32_(bits_RV)
    bits_RV ^= keys_R2[:, 1:]
    _lowbias32_(bits_RV)
    uniform_RV = (bits_RV & _MASK_31).float()
    uniform_RV.add_(0.5).mul_(2.0**-31).clamp_(max=_BELOW_ONE)
    return uniform_RV.neg_().log1p_().neg_().log_().neg_()


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


def _lowbias32_(x: Tensor) -> None:
    """Mix int32 values in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB_352D
    x ^= (x >> 15) & 0x1_FFFF
    x *= 0x846C_A68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
