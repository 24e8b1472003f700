"""The meter of a rank's experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from divisi.cluster.dispatch.meter import MeteredExperts
from divisi.cluster.dispatch.protocol import Experts
from divisi.model.placement import Layout

LAYERS, EXPERTS = (2, 5), 8


class Doubling:
    """Its experts double; of four virtual shards it holds some."""

    num_leaves, bank = 4, None

    def __init__(self, held: set[int]) -> None:
        self.held = frozenset(held)

    def partial_sum(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return 2 * x_TD

    routed = partial_sum

    def serving(self, layout: Layout, seat: int) -> Doubling:
        return Doubling(set(layout.served[seat]))


def metered(held: set[int] | None = None) -> MeteredExperts:
    return MeteredExperts(Doubling(held or {0}), LAYERS, EXPERTS, torch.device("cpu"))


def serve(experts: Experts, layer: int, ids: list[list[int]]) -> Tensor:
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
    assert serve(experts, 5, [[0, 4], [0, 3], [0, 2]]).tolist() == [[2.0] * 3] * 3
    found = experts.stats()
    assert found["expert_tokens"] == {"2": 0.0, "5": 4.0}, "three of expert 0, one of expert 4"
    assert found["expert_busiest"]["5"] == pytest.approx(1.5)
    assert found["expert_spread"]["5"] == pytest.approx(0.5)
    assert experts.seconds > 0


def test_no_expert_is_nobodys_row() -> None:
    experts = metered({0, 1, 2, 3})
    experts.measuring = True
    serve(experts, 2, [[-1, 7], [-1, -1]])
    assert experts.leaf_rows().tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_rows_are_counted_by_virtual_shard_and_stay_when_others_are_served() -> None:
    """By who serves: of what is held besides, as a copy, nothing counts here."""
    experts = metered({0, 1, 2})
    experts.measuring = True
    rows = [[0, 1], [4, 2], [3, 7]]
    for served in ((0, 1), (1, 2)):
        others = tuple(leaf for leaf in range(4) if leaf not in served)
        serve(experts.serving(Layout(4, (others, served)), 1), 5, rows)
    assert experts.leaf_rows().tolist() == [[0] * 4, [2, 2, 1, 0]]
    found = experts.stats()
    assert found["leaf_rows"] == {"0": 2.0, "1": 2.0, "2": 1.0}
    assert found["expert_tokens"]["5"] == 5.0, "a counter never falls"
    assert found["expert_busiest"]["5"] == pytest.approx(2.0), "of the four served now: one row each of 1 and 2"


def test_an_epoch_with_the_same_layout_goes_on_counting() -> None:
    experts = metered({0, 1})
    experts.measuring = True
    for ids in ([0, 1], [4, 5]):
        serve(experts.serving(Layout.even(4, 2), 0), 2, [ids])
    assert experts.stats()["expert_busiest"]["2"] == pytest.approx(1.0)
