"""Rows of logits to draw tokens from: every other one greedy."""

from __future__ import annotations

import numpy as np
import torch

from divisi.benchmarks.gpu import cases
from divisi.benchmarks.gpu.cases import Case
from divisi.kernels.sampling.layout import Draw, Draws


def choose_tokens(draw: cases.Draw, name: str, rows: int, vocab: int) -> Case:
    """fp32 whatever the model is in."""
    logits = draw.normal(rows, vocab, scale=3.0, dtype=torch.float32)
    draws = Draws([Draw(seed, 0.8 * (seed % 2)) for seed in range(rows)])
    return Case("choose_tokens", name, (logits, draws, np.arange(rows, dtype=np.int64)), bytes=1.5 * logits.nbytes)
