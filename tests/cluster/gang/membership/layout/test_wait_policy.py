"""How many expert shards there are to be: the rule by itself, and in a toy gang, which finds wrong ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from divisi.cluster.gang.membership.layout import wait_policy
from divisi.cluster.gang.membership.layout.wait_policy import (
    LIGHT,
    Vote,
    WaitRule,
    Window,
    decide,
    expected_share,
    wanted,
)
from tests.support.wait_sim import IDLE, Load, ToyGang

RULE = WaitRule(least=1, most=8, high=0.5, low=0.25, upscale_delay_s=20, downscale_delay_s=60)
NARROW = WaitRule(least=1, most=8, high=0.5, low=0.49, upscale_delay_s=20, downscale_delay_s=60)
HOUR = 3600
SEEDS = range(12)


def window(share: float, busy: float = 1.0, seconds: float = 5.0) -> Window:
    in_steps = busy * seconds
    return Window(seconds, 2 * in_steps, 2 * share * in_steps, in_steps)


@pytest.mark.parametrize(
    ("seen", "shards", "votes_for"),
    [
        (window(0.51), 2, 3),
        (window(0.50), 2, 2),
        (window(0.51), 8, 8),
        (window(0.25), 2, 2),
        (window(0.24), 2, 1),
        (window(0.24), 1, 1),
        (Window(5.0), 6, 1),  # nothing has run
        (window(0.9, busy=0.09), 2, 2),  # it may wait: hardly anybody is there
        (window(0.9, busy=0.02), 2, 1),  # 4 % then, which is as little
        (window(0.9, busy=0.06), 2, 2),  # 11 % then
    ],
)
def test_what_a_window_votes_for(seen: Window, shards: int, votes_for: int) -> None:
    assert wanted(seen, shards, RULE) == votes_for


def test_one_less_only_where_that_would_not_call_for_one_more() -> None:
    """From 0.4 with two shards to 0.57 with one, from 0.4 with eight to 0.43 with seven."""
    assert expected_share(0.4, 2, 1) == pytest.approx(4 / 7)
    assert wanted(window(0.4), 2, NARROW) == 2
    assert wanted(window(0.4), 8, NARROW) == 7
    assert wanted(window(0.43), 8, NARROW) == 8, "0.46 is too near to 0.5"
    assert expected_share(0.0, 2, 1) == 0.0
    assert expected_share(1.0, 2, 1) == 1.0


@pytest.mark.parametrize(
    ("votes", "decided"),
    [
        ([], 2),
        ([3] * 3, 2),  # not for long enough
        ([3] * 4, 3),
        ([3, 3, 2, 3, 3], 2),  # a lull in between
        ([2, 3, 3, 3, 3], 3),
        ([1] * 11, 2),
        ([1] * 12, 1),
        ([2] + [1] * 12, 1),
        ([2] + [1] * 11, 2),
    ],
)
def test_what_was_voted_for_in_all_of_a_delay_is_decided(votes: list[int], decided: int) -> None:
    assert decide([Vote(window(0.3), shards) for shards in votes], 2, RULE)[0] == decided


def test_an_idle_gang_goes_down_to_the_least_at_once() -> None:
    assert decide([Vote(Window(5.0), 1)] * 12, 8, RULE)[0] == 1
    assert decide([Vote(Window(5.0), 1)] * 11 + [Vote(window(0.1), 7)], 8, RULE)[0] == 7


def test_without_delays_the_last_window_decides() -> None:
    rule = WaitRule(1, 8, 0.5, 0.25, 0.0, 0.0)
    assert decide([Vote(window(0.1), 1), Vote(window(0.6), 3)], 2, rule)[0] == 3
    assert decide([Vote(window(0.6), 3), Vote(window(0.1), 1)], 2, rule)[0] == 1


def no_way_back(numbers: list[int]) -> None:
    """Those that it has had never go both up and down."""
    steps = [after - before for before, after in pairwise(numbers)]
    assert not (any(step > 0 for step in steps) and any(step < 0 for step in steps)), numbers


def rests(rule: WaitRule, load: Load, shards: int) -> None:
    """It is where the rule wants it, give or take what noise may do."""
    share = load.share(shards)
    if load.busy(shards) > 1.1 * LIGHT:
        assert share <= rule.high * 1.05 or shards == rule.most, f"{shards} shards, {share:.2f} waited"
    if load.busy(shards) > 1.1 * LIGHT and shards > rule.least and share < 0.95 * rule.low:
        assert load.share(shards - 1) > 0.8 * rule.high, f"{shards} shards, {share:.2f} waited"


def some_load(rng: random.Random, wire: bool) -> Load:
    steps = rng.choice((None, rng.uniform(1, 60)))
    return Load(rng.uniform(0.002, 0.02), rng.uniform(0.001, 0.1), rng.uniform(0.0, 0.01) if wire else 0.0, steps)


def some_rule(rng: random.Random) -> WaitRule:
    high = rng.uniform(0.2, 0.8)
    return WaitRule(1, 8, high, high * rng.uniform(0.1, 0.98), 20, 60)


def constant(seed: int) -> None:
    rng = random.Random(seed)
    rule, load, shards = some_rule(rng), some_load(rng, wire=False), rng.randint(1, 8)
    gang = ToyGang(rule, shards, seed)
    gang.run(HOUR, load)
    no_way_back([shards, *gang.numbers()])
    rests(rule, load, gang.served)


@pytest.mark.parametrize("seed", SEEDS)
def test_constant_load_comes_to_rest(seed: int) -> None:
    constant(seed)


@pytest.mark.parametrize("seed", range(6))
def test_it_comes_to_rest_where_waiting_does_not_go_by_the_number(seed: int) -> None:
    rng = random.Random(seed)
    rule, load, shards = some_rule(rng), some_load(rng, wire=True), rng.randint(1, 8)
    gang = ToyGang(rule, shards, seed)
    gang.run(HOUR, load)
    no_way_back([shards, *gang.numbers()])


def narrow(seed: int) -> None:
    gang = ToyGang(NARROW, 2, seed)
    gang.run(HOUR, Load(0.010, 0.019))  # 0.49 waited with two, 0.66 with one
    assert gang.numbers() == []


def light(seed: int) -> None:
    """A step every 2 s: 0.1 s with eight shards, of which three quarters are waited for."""
    gang = ToyGang(RULE, 4, seed)
    gang.run(HOUR, Load(0.025, 0.600, steps=0.5))
    assert gang.numbers() == [], "a step would take most of a second with one"


def bursts(seed: int) -> None:
    gang = ToyGang(RULE, 1, seed)
    for _ in range(30):
        gang.run(10, Load(0.010, 0.045))
        gang.run(50, Load(0.010, 0.006))
    assert gang.numbers() == []


@pytest.mark.parametrize("show", [narrow, light, bursts])
def test_what_is_near_a_mark_or_soon_over_changes_nothing(show: Callable[[int], None]) -> None:
    show(1)


def day(seed: int) -> None:
    gang = ToyGang(RULE, 1, seed)
    quiet, rush = Load(0.010, 0.006), Load(0.010, 0.045)
    for load, shards in ((quiet, 1), (rush, 5), (quiet, 1), (rush, 5), (IDLE, 1)):
        gang.run(HOUR // 2, load)
        assert gang.served == shards, gang.changes
    assert gang.numbers() == [2, 3, 4, 5, 4, 3, 2, 1, 2, 3, 4, 5, 1]
    assert gang.changes[-1][2] == "nothing has run for 60 s"


def test_it_follows_a_day() -> None:
    day(1)


def _no_guard(share: float, shards: int, other: int) -> float:
    return 0.0


def _any_window(votes: list[Vote], seconds: float) -> list[Vote]:
    return list(votes[-1:])


@pytest.mark.parametrize(
    ("name", "rule", "show"),
    [
        ("expected_share", _no_guard, narrow),
        ("LIGHT", 0.0, light),
        ("last", _any_window, bursts),
    ],
    ids=["no guard", "share counts where nobody is", "no delay"],
)
def test_the_simulation_finds_a_wrong_rule(
    name: str, rule: object, show: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wait_policy, name, rule)
    with pytest.raises(AssertionError):
        any(map(show, SEEDS))
