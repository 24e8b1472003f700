"""The meter of a rank's experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.meter import MeteredExperts


class Doubling:
    """Its experts double."""

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return 2 * x_TD

    routed = partial_sum


def metered() -> MeteredExperts:
    return MeteredExperts(Doubling(), [2, 5], [0, 1], 4, torch.device("cpu"))


def serve(experts: MeteredExperts, layer: int, ids: list[list[int]]) -> Tensor:
    ids_TK = torch.tensor(ids, dtype=torch.int32)
    return experts.partial_sum(layer, torch.ones(len(ids), 3), ids_TK, torch.ones(ids_TK.shape))


def test_nothing_is_counted_unless_it_is_measured() -> None:
    experts = metered()
    assert serve(experts, 2, [[0, 1]]).tolist() == [[2.0, 2.0, 2.0]]
    assert experts.seconds == 0
    assert experts.stats()["expert_tokens"] == {"2": 0.0, "5": 0.0}
    assert experts.stats()["expert_busiest"] == {"2": 0.0, "5": 0.0}


def test_rows_are_counted_by_layer_and_those_of_other_ranks_are_not() -> None:
    experts = metered()
    experts.measuring = True
    assert serve(experts, 5, [[0, 1], [0, 3], [0, 2]]).tolist() == [[2.0] * 3] * 3
    found = experts.stats()
    assert found["expert_tokens"] == {"2": 0.0, "5": 4.0}, "three of expert 0, one of expert 1"
    assert found["expert_busiest"]["5"] == pytest.approx(1.5)
    assert found["expert_spread"]["5"] == pytest.approx(0.5)
    assert experts.seconds > 0
