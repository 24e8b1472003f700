"""Drawing tokens in C++.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divisi.kernels.native.loader import Library
from divisi.kernels.sampling.layout import Draws


class Sampling:
    """One call for a step's rows, of whatever kind."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions

    def choose_tokens(self, logits_RV: Tensor, draws: Draws, positions_R: NDArray[np.int64]) -> Tensor:
        rows, vocab = logits_RV.shape
        assert logits_RV.stride(1) == 1
        assert positions_R.dtype == np.int64
        tokens_R = torch.empty(rows, dtype=torch.int64)
        self._functions.divisi_choose(
            logits_RV.data_ptr(), logits_RV.stride(0), vocab, positions_R.ctypes.data, *draws.addresses,
            tokens_R.data_ptr(), rows, torch.get_num_threads(),
        )  # fmt: skip
        return tokens_R
