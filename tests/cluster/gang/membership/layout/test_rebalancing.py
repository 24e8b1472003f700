"""When virtual shards are moved, and when not: a simulated gang with rows by seeded chance, and wrong rules, which it
finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from divisi.cluster.gang.membership.layout import rebalancing
from divisi.cluster.gang.membership.layout.balance import most_leaves, shares
from divisi.cluster.gang.membership.layout.layouts import Holdings, Layouts
from divisi.cluster.gang.membership.layout.rebalancing import Rebalancing
from divisi.model.placement import Layout
from tests.support.balance_sim import LEAF_BYTES, SimGang

LEAVES = 32
MINUTES = 60
VERIFY = pytest.mark.verify
SIZES = [pytest.param(2, marks=VERIFY), pytest.param(4, marks=VERIFY), 8]


def hot(shards: int, seed: int) -> list[float]:
    """The first shard's virtual shards get four times as much as others, which differ a little."""
    rng, first = random.Random(seed), LEAVES // shards
    return [(4.0 if leaf < first else 1.0) * rng.uniform(0.8, 1.2) for leaf in range(LEAVES)]


def end_of_hot_set(shards: int, seed: int = 1, copies: int = 0) -> SimGang:
    gang = SimGang(shards, hot(shards, seed), seed, copies)
    assert max(shares(gang.layouts[0], gang.weights)) > 1.5, "nothing is planted"
    gang.run(5 * MINUTES)
    assert max(shares(gang.layouts[-1], gang.weights)) < 1.2
    assert 1 <= gang.number("expert_moves") == len(set(gang.layouts)) - 1 <= 20
    assert gang.number("expert_imbalance") < 1.2
    assert gang.coordinator.numbers()["stalls"] == {
        "scaled": 0, "moved": gang.number("expert_moves"), "changed": 0, "broken": 0,
    }  # fmt: skip
    return gang


def balanced(shards: int, seed: int = 1) -> None:
    gang = SimGang(shards, [1.0] * LEAVES, seed)
    gang.run(5 * MINUTES)
    assert 1.0 < gang.number("expert_imbalance") < 1.2, "nothing was counted, or more than chance makes"
    assert gang.number("expert_moves") == 0
    assert len(gang.layouts) == 1


@pytest.mark.parametrize("shards", SIZES)
def test_a_planted_hot_set_is_shared_out_in_a_few_moves(shards: int) -> None:
    gang = end_of_hot_set(shards)
    read = sum(shard.read for shard in gang.shards.values())
    assert 0 < gang.number("expert_moved_bytes") == read <= 2 * LEAF_BYTES * gang.number("expert_moves")
    assert max(len(own) for own in gang.layouts[-1].served) <= most_leaves(LEAVES, shards)
    served = gang.layouts[-1].served
    assert all(shard.leaves == set(served[shard.index]) for shard in gang.shards.values()), "it is not given up"


@pytest.mark.parametrize("shards", SIZES)
def test_balanced_load_moves_nothing(shards: int) -> None:
    balanced(shards)


@VERIFY
def test_what_is_held_as_a_copy_is_moved_without_being_loaded() -> None:
    gang = SimGang(2, hot(2, 1), 1, copies=1)
    gang.run(20)
    read = sum(shard.read for shard in gang.shards.values())
    assert read == LEAVES * LEAF_BYTES, "the copies themselves"
    gang.run(5 * MINUTES)
    assert gang.number("expert_moves") > 0
    assert max(shares(gang.layouts[-1], gang.weights)) < 1.2
    assert gang.number("expert_moved_bytes") == 0
    assert sum(shard.read for shard in gang.shards.values()) == read


@VERIFY
def test_a_move_that_is_not_loaded_is_given_up_and_others_wait_longer_and_longer() -> None:
    gang = SimGang(4, hot(4, 1), 1, loads_s=1e9)
    gang.run(4 * MINUTES)
    assert gang.number("expert_moves_given_up") == 1
    gang.run(21 * MINUTES)
    assert gang.number("expert_moves_given_up") in (4, 5)
    assert gang.number("expert_moves") == 0
    assert len(gang.layouts) == 1, "no epoch ends for its sake"


@VERIFY
def test_one_hot_virtual_shard_that_nothing_helps_moves_little() -> None:
    weights = [32.0] + [1.0] * (LEAVES - 1)
    gang = SimGang(4, weights, 1)
    gang.run(30 * MINUTES)
    assert len(gang.layouts[-1].served[0]) < LEAVES // 4, "the others are taken from it"
    assert 0 < gang.number("expert_moves") <= 10


@VERIFY
def test_nothing_moves_while_another_number_of_shards_is_asked_for() -> None:
    gang = SimGang(2, hot(2, 1), 1)
    gang.coordinator.scale(3)
    gang.run(2 * MINUTES)
    assert gang.number("expert_moves") == 0
    assert gang.coordinator.scale_status().wanted == 3
    gang.coordinator.scale(2)
    gang.run(5 * MINUTES)
    assert gang.number("expert_moves") > 0


def test_a_change_of_their_number_ends_a_move() -> None:
    gang = SimGang(2, hot(2, 1), 1, loads_s=1e9)
    gang.run(30)
    assert gang.coordinator.scale_status().waits_for == ("expert:1 is to load 1 of 17 virtual shards",)
    gang.coordinator.scale(3)
    gang.run(4 * MINUTES)
    assert gang.coordinator.scale_status().waits_for == ("expert:2 is not there yet",)
    assert gang.number("expert_moves_given_up") == 0


def _at_once(self: Rebalancing, now: float) -> bool:
    return True


def _counts_unloaded(layouts: Layouts, holdings: Holdings) -> Layout | None:
    return layouts.goal or CHOOSE(layouts, holdings)


def _two_at_once(layout: Layout, load: list[float], held: dict[int, frozenset[int]]) -> Layout | None:
    once = BETTER(layout, load, held)
    return None if once is None else BETTER(once, load, held) or once


BETTER, CHOOSE = rebalancing.better, Layouts.choose


@pytest.mark.parametrize(
    ("owner", "name", "rule", "show"),
    [
        (Rebalancing, "_wants_a_move", _at_once, lambda: [balanced(8, seed) for seed in range(3)]),
        (Layouts, "choose", _counts_unloaded, lambda: end_of_hot_set(4)),
        (rebalancing, "better", _two_at_once, lambda: end_of_hot_set(4)),
    ],
    ids=["ignores hysteresis", "moves to who has not loaded", "two at once"],
)
def test_the_simulation_finds_a_wrong_rule(
    owner: object, name: str, rule: Callable[..., object], show: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, rule)
    with pytest.raises(AssertionError):
        show()
