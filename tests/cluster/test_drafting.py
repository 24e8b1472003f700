"""How far drafts go: by the table of times, by what stood before, within every limit."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from divisi.cluster.drafting import Drafter, FixedDepth, MostTokensPerSecond, StepTimes, Survival
from divisi.cluster.passes import PassKind

FULL, DRAFT = PassKind.FULL, PassKind.DRAFT
ROWS = (1, 2, 4, 8, 16, 32, 47, 48, 64, 128, 256)


def times_by(full: Callable[[int], float], draft: Callable[[int], float]) -> StepTimes:
    return StepTimes({FULL: {rows: full(rows) for rows in ROWS}, DRAFT: {rows: draft(rows) for rows in ROWS}})


FLAT = times_by(lambda rows: 1.0, lambda rows: 0.01)
"""Rows cost nothing: as on a GPU that waits for memory."""
DEAR = times_by(lambda rows: float(rows), lambda rows: 0.1 * rows)
"""Every row costs the same."""


def taught(policy: MostTokensPerSecond, stood: list[int], drafted: int = 4) -> Drafter:
    drafter = Drafter()
    for accepted in stood:
        policy.note(drafter, drafted, accepted)
    return drafter


def test_times_between_and_past_what_was_measured() -> None:
    times = times_by(lambda rows: 1.0 + rows, lambda rows: 0.5)
    assert times.of(FULL, 3) == 4.0
    assert times.of(FULL, 48) == 49.0
    assert times.of(FULL, 512) == 2 * 257.0
    assert times.of(DRAFT, 100) == 0.5


def test_times_follow_what_steps_take() -> None:
    times = times_by(lambda rows: 1.0, lambda rows: 1.0)
    for _ in range(60):
        times.note(FULL, 4, 3.0)
    assert times.of(FULL, 8) == pytest.approx(3.0, rel=0.01)
    assert times.of(DRAFT, 8) == 1.0


def test_survival_is_learnt_by_position_and_forgets() -> None:
    survival = Survival()
    assert survival.chance(0, 0.7) == 0.7
    for _ in range(40):
        survival.note(4, 2)
    assert survival.chance(1, 0.5) > 0.8
    assert survival.chance(2, 0.5) < 0.2
    assert survival.chance(3, 0.5) == 0.5, "a draft behind a rejected one was not tried"
    for _ in range(40):
        survival.note(4, 0)
    assert survival.chance(0, 0.5) < 0.2


def test_cheap_rows_are_taken_and_dear_ones_are_not() -> None:
    for times, good, bad in ((FLAT, 5, 5), (DEAR, 0, 0)):
        policy = MostTokensPerSecond(times)
        drafters = [taught(policy, [4] * 30), taught(policy, [2] * 30)]
        assert policy.depths(drafters, [5, 5], 2) == [good, bad]


def test_who_is_right_more_often_drafts_further() -> None:
    policy = MostTokensPerSecond(times_by(lambda rows: 4.0 + rows, lambda rows: 0.05))
    right, wrong = taught(policy, [4] * 40), taught(policy, [0] * 40)
    far, near = policy.depths([right, wrong], [4, 4], 2)
    assert far > near


def test_a_jump_in_costs_is_looked_over() -> None:
    """At 48 rows the kernels change and get cheaper: better past it than just below."""
    policy = MostTokensPerSecond(times_by(lambda rows: rows * (1.0 if rows < 48 else 0.2), lambda rows: 0.01))
    drafters = [taught(policy, [4] * 40) for _ in range(30)]
    assert 30 + sum(policy.depths(drafters, [3] * 30, 30)) >= 48


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_beats_the_one_made(seed: int) -> None:
    """Neither nothing, nor everything, nor one draft less of a sequence alone gives more tokens per second."""
    rng = random.Random(seed)
    knots = sorted(rng.sample(range(2, 60), 4))
    costs = [rng.uniform(0.02, 0.4) for _ in knots]
    times = times_by(
        lambda rows: 1.0 + sum(cost * max(rows - knot, 0) for knot, cost in zip(knots, costs, strict=True)),
        lambda rows: 0.1 + 0.01 * rows,
    )
    policy = MostTokensPerSecond(times)
    drafters = [taught(policy, [rng.randint(0, 4) for _ in range(12)]) for _ in range(rng.randint(1, 12))]
    limits = [rng.randint(0, 5) for _ in drafters]
    depths = policy.depths(drafters, limits, len(drafters))
    assert all(0 <= depth <= limit for depth, limit in zip(depths, limits, strict=True))

    def rate(chosen: list[int]) -> float:
        tokens = sum(1 + sum(policy._chances(d, k)) for d, k in zip(drafters, chosen, strict=True))
        drafting = sum(times.of(DRAFT, rows) for at in range(8) if (rows := sum(k > at for k in chosen)))
        return tokens / (drafting + times.of(FULL, len(drafters) + sum(chosen)))

    best = rate(depths)
    for index in range(len(depths)):
        if depths[index]:
            assert rate([k - (i == index) for i, k in enumerate(depths)]) <= best + 1e-9 or len(drafters) > 1
    assert rate([0] * len(depths)) <= best + 1e-9
    assert rate(limits) <= best + 1e-9


def test_who_does_not_draft_is_tried_again_now_and_then() -> None:
    policy = MostTokensPerSecond(DEAR)
    drafter = taught(policy, [0] * 10)
    depths = []
    for _ in range(100):
        (depth,) = policy.depths([drafter], [3], 1)
        policy.note(drafter, depth, 0)
        depths.append(depth)
    assert set(depths) == {0, 1}
    assert 2 <= sum(depths) <= 4


def test_a_limit_of_nothing_is_never_exceeded() -> None:
    policy = MostTokensPerSecond(FLAT)
    drafter = Drafter(idle_steps=1000)
    assert policy.depths([drafter], [0], 1) == [0]
    assert FixedDepth().depths([drafter, drafter], [0, 5], 2) == [0, 5]
