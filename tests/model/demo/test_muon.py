"""The optimiser: what it does to matrices, and that packed experts are updated one by one."""

from __future__ import annotations

import torch
from torch import nn

from divisi.model.demo.muon import Optimiser, orthogonalise


def test_directions_become_equally_long() -> None:
    torch.manual_seed(0)
    for rows, columns in ((16, 40), (40, 16)):
        left, right = torch.linalg.qr(torch.randn(rows, 16))[0], torch.linalg.qr(torch.randn(columns, 16))[0]
        matrix = left @ torch.logspace(-2, 0, 16).diag() @ right.T
        singular = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_packed_experts_are_matrices_of_their_own() -> None:
    torch.manual_seed(1)
    width, experts, inner = 32, 4, 16
    packed = nn.Parameter(torch.zeros(width, experts * 2 * inner))
    gradient = torch.randn(packed.shape)
    optimiser = Optimiser({"experts.gate_up_DF": packed}, muon_rate=0.1, adam_rate=1.0, expert_width=inner)
    optimiser.step({"experts.gate_up_DF": gradient}, factor=0.5)
    for matrix in range(2 * experts):
        at = slice(matrix * inner, (matrix + 1) * inner)
        expected = orthogonalise(gradient[None, :, at].mT)[0].T
        torch.testing.assert_close(packed.data[:, at], -0.05 * expected, atol=1e-4, rtol=1e-3)


def test_vectors_take_steps_of_adams_length() -> None:
    scale = nn.Parameter(torch.zeros(64))
    optimiser = Optimiser({"norm.weight": scale}, muon_rate=0.1, adam_rate=0.01, expert_width=16)
    for _ in range(5):
        optimiser.step({"norm.weight": torch.full((64,), 3.0)}, factor=1.0)
    torch.testing.assert_close(scale.data, torch.full((64,), -0.05))
