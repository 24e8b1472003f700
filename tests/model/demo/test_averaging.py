"""The average of weights: the formula, that it follows, and that it is calmer than what it averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from divisi.model.demo.averaging import Average


def test_the_first_steps_count_soon() -> None:
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = Average(network)
    expected, generator = 0.0, torch.Generator().manual_seed(1)
    for step in range(1, 40):
        value = float(torch.randn((), generator=generator))
        nn.init.constant_(network.weight, value)
        average.update()
        kept = step / (4 + step)
        expected = kept * expected + (1 - kept) * value
    assert float(average.weights["weight"][0, 0]) == pytest.approx(expected, rel=1e-5)


def test_it_is_calmer_than_the_weights_and_leaves_them_alone() -> None:
    torch.manual_seed(2)
    network = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(network.weight)
    average = Average(network)
    for _ in range(3000):
        nn.init.normal_(network.weight, mean=1.0)
        before = network.weight.clone()
        average.update()
        assert torch.equal(network.weight, before)
    spread = float((average.weights["weight"] - 1.0).std())
    assert spread < 0.05, "the noise of single steps was 1"
    assert float(average.weights["weight"].mean()) == pytest.approx(1.0, abs=0.02), "it forgot where it began"
