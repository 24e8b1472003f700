"""Which nodes a role may be on, and what is said where there are none."""

from __future__ import annotations

import pytest

from divisi.cluster.nodes import Node, NodeChoice, Placement, empty_groups, second_home

GPU = Node({"divisi-role": "experts", "zone": "a"}, {"CPU": 1.0, "GPU": 1.0, "rack": 2.0})
PLAIN = Node({"divisi-role": "ingress"}, {"CPU": 1.0})


@pytest.mark.parametrize(("choice", "admits"), [
    (NodeChoice(), True),
    (NodeChoice({"divisi-role": "experts"}), True),
    (NodeChoice({"divisi-role": "experts", "zone": "b"}), False),
    (NodeChoice({"missing": ""}), False),
    (NodeChoice(resources={"rack": 2.0}), True),
    (NodeChoice(resources={"rack": 2.5}), False),
    (NodeChoice({"zone": "a"}, {"rack": 1.0}), True),
    (NodeChoice({"zone": "a"}, {"shelf": 1.0}), False),
])  # fmt: skip
def test_a_choice_wants_all_that_it_names(choice: NodeChoice, admits: bool) -> None:
    assert choice.admits(GPU) is admits


def test_empty_groups_are_named_by_their_setting() -> None:
    placement = Placement(
        NodeChoice({"divisi-role": "ingress"}),
        NodeChoice({"divisi-role": "attention"}),
        NodeChoice(resources={"rack": 3.0}),
    )
    assert empty_groups(placement, 2, [GPU, PLAIN]) == [
        "placement.attention: no node of the cluster has the label divisi-role=attention",
        "placement.experts: no node of the cluster has 3 of the resource rack",
    ]
    assert empty_groups(placement, 0, [GPU, PLAIN]) == empty_groups(placement, 2, [GPU, PLAIN])[:1]
    assert empty_groups(Placement(), 2, []) == []


def test_a_second_home_is_the_same_for_all_but_itself() -> None:
    nodes = [Node({}, {"CPU": 2.0}, name) for name in ("c", "b", "d")] + [Node({}, {"CPU": 0.0}, "a")]
    needed = NodeChoice(resources={"CPU": 1.0})
    assert [second_home(own, needed, nodes) for own in ("b", "c", "d")] == ["c", "b", "b"]
    assert second_home("c", needed, nodes[:1]) is None
