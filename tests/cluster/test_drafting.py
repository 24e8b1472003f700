"""How far drafts go: by what steps take, by what stood before, within every limit, and fair to those without."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from divisi.cluster.drafting import (
    _AS_GOOD,
    ALONE,
    MOST_DRAFTS,
    Company,
    Drafter,
    FixedDepth,
    MostTokensPerSecond,
    Survival,
)
from divisi.cluster.step_times.measured import Measured, Reading
from divisi.cluster.step_times.times import StepTimes

NUMBERS = (1, 2, 4, 8, 16, 32)
EACH = (1, 2, 3, 4, 6, 9)


def times_by(full: Callable[[int], float], draft: Callable[[int], float], reading: Reading = Reading()) -> StepTimes:  # noqa: B008
    """By rows, whoever's they are."""
    table = {sequences: {each: full(sequences * each) for each in EACH} for sequences in NUMBERS}
    return StepTimes(Measured(table, {rows: draft(rows) for rows in NUMBERS}, reading))


def flat() -> StepTimes:
    """Rows cost nothing: as on a GPU that waits for memory."""
    return times_by(lambda rows: 1.0, lambda rows: 0.01)


def dear() -> StepTimes:
    """Every row costs the same."""
    return times_by(lambda rows: float(rows), lambda rows: 0.1 * rows)


def taught(policy: MostTokensPerSecond, stood: list[int], drafted: int = 4, limit: int = 5) -> Drafter:
    drafter = Drafter(limit=limit)
    for accepted in stood:
        policy.note(drafter, drafted, accepted)
    return drafter


def chance(survival: Survival, place: int, prior: float) -> float:
    return survival.chances([prior] * MOST_DRAFTS)[place]


def test_survival_is_learnt_by_position_and_forgets() -> None:
    survival = Survival()
    assert chance(survival, 0, 0.7) == 0.7
    for _ in range(40):
        survival.fade()
        survival.note(4, 2)
    assert chance(survival, 1, 0.5) > 0.8
    assert chance(survival, 2, 0.5) < 0.2
    assert chance(survival, 3, 0.5) == 0.5, "a draft behind a rejected one was not tried"
    for _ in range(40):
        survival.fade()
        survival.note(4, 0)
    assert chance(survival, 0, 0.5) < 0.2


def test_what_is_no_longer_tried_is_forgotten() -> None:
    survival = Survival()
    for _ in range(10):
        survival.note(2, 1)
    assert chance(survival, 1, 0.9) < 0.3
    for _ in range(60):
        survival.fade()
    assert chance(survival, 1, 0.9) > 0.85


def test_survival_is_the_same_after_any_number_of_steps() -> None:
    early, late = Survival(), Survival()
    for _ in range(100_000):
        late.fade()
    for survival in (early, late):
        for accepted in (3, 1, 4, 0, 2):
            survival.fade()
            survival.note(4, accepted)
    priors = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert late.chances(priors) == pytest.approx(early.chances(priors))
    assert late.chances_in_turn(0.85) == pytest.approx(early.chances_in_turn(0.85))


def test_cheap_rows_are_taken_and_dear_ones_are_not() -> None:
    for times, wanted in ((flat(), [5, 5]), (dear(), [0, 0])):
        policy = MostTokensPerSecond(times)
        drafters = [taught(policy, [4] * 30), taught(policy, [2] * 30)]
        assert policy.depths(drafters, ALONE) == wanted


def test_drafts_go_all_the_way_until_something_is_measured() -> None:
    policy = MostTokensPerSecond(StepTimes())
    assert policy.depths([Drafter(limit=2), Drafter(limit=4)], ALONE) == [2, 4]


def test_what_gains_next_to_nothing_is_left() -> None:
    """A draft that always stands, in a step that takes 1.98 times as long."""
    policy = MostTokensPerSecond(times_by(lambda rows: 0.02 + 0.98 * rows, lambda rows: 0.0))
    assert policy.depths([taught(policy, [4] * 60)], ALONE) == [0]


def test_a_draft_that_nobody_has_tried_is_as_likely_to_stand_as_the_one_before_it() -> None:
    """The first two have always stood; a third would not pay if it stood no more often than is guessed of any."""
    policy = MostTokensPerSecond(times_by(lambda rows: 0.42 + rows, lambda rows: 0.0))
    assert policy.depths([taught(policy, [2] * 60, drafted=2, limit=3)], ALONE) == [3]


def test_who_is_right_more_often_drafts_further() -> None:
    policy = MostTokensPerSecond(times_by(lambda rows: 4.0 + rows, lambda rows: 0.05))
    right, wrong = taught(policy, [4] * 40), taught(policy, [0] * 40)
    far, near = policy.depths([right, wrong], ALONE)
    assert far > near


def test_who_has_read_more_drafts_less() -> None:
    """Each row reads the tokens before it."""
    reading = Reading(0.01, 0.01, 0.001)
    policy = MostTokensPerSecond(times_by(lambda rows: 10.0 + 0.1 * rows, lambda rows: 0.05, reading))
    short, long = taught(policy, [4] * 40), taught(policy, [4] * 40)
    short.context, long.context = 10, 2000
    assert policy.depths([short, long], ALONE) == [5, 0]


@pytest.mark.parametrize(("six_rows", "depth"), [(4.55, 5), (5.2, 3)])
def test_of_depths_that_are_about_as_good_the_deepest_is_taken(six_rows: float, depth: int) -> None:
    """Three drafts give 4 tokens in 3 seconds, five 6 in 4.55: one hundredth less; in 5.2 too much less."""
    seconds = {1: 1.0, 2: 1.9, 3: 2.4, 4: 3.0, 6: six_rows, 9: 9.0}
    policy = MostTokensPerSecond(StepTimes(Measured({1: seconds}, {1: 1e-6})))
    assert policy.depths([taught(policy, [5] * 200, drafted=5)], ALONE) == [depth]


def test_a_jump_in_costs_is_looked_over() -> None:
    """At 48 rows the kernels change and get cheaper: better past it than just below."""
    policy = MostTokensPerSecond(times_by(lambda rows: rows * (1.0 if rows < 48 else 0.2), lambda rows: 0.01))
    drafters = [taught(policy, [4] * 40, limit=3) for _ in range(16)]
    assert 16 + sum(policy.depths(drafters, ALONE)) >= 48


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_beats_the_one_made(seed: int) -> None:
    """Neither nothing, nor everything, nor one draft less of a sequence gives more tokens a second than is as good."""
    rng = random.Random(seed)
    knots = sorted(rng.sample(range(2, 60), 4))
    costs = [rng.uniform(0.02, 0.4) for _ in knots]
    times = times_by(
        lambda rows: 1.0 + sum(cost * max(rows - knot, 0) for knot, cost in zip(knots, costs, strict=True)),
        lambda rows: 0.1 + 0.01 * rows,
    )
    policy = MostTokensPerSecond(times)
    # All draft, or those that don't would hold the others back.
    drafters = [taught(policy, [rng.randint(2, 4) for _ in range(12)], limit=rng.randint(1, 5)) for _ in range(8)]
    depths = policy.depths(drafters, ALONE)
    limits = [drafter.limit for drafter in drafters]
    assert all(0 <= depth <= limit for depth, limit in zip(depths, limits, strict=True))

    priors = policy._all.chances_in_turn(0.85)

    def rate(chosen: list[int]) -> float:
        tokens = float(len(drafters))
        for drafter, depth in zip(drafters, chosen, strict=True):
            all_stand = 1.0
            for one in drafter.survival.chances(priors)[:depth]:
                all_stand *= one
                tokens += all_stand
        draft, full = times.draft(8), times.full(8, sum(chosen))
        drafting = sum(draft[sum(depth > at for depth in chosen)] for at in range(5))
        return tokens / (drafting + full[sum(chosen)])

    best = rate(depths)
    assert rate([0] * len(depths)) <= best + 1e-9
    if min(depths) > 0:
        for index in range(len(depths)):
            assert _AS_GOOD * rate([depth - (at == index) for at, depth in enumerate(depths)]) <= best + 1e-9
    assert best >= _AS_GOOD * rate(limits)


def test_who_does_not_draft_is_tried_again_now_and_then() -> None:
    policy = MostTokensPerSecond(times_by(lambda rows: 10.0 + 2 * rows, lambda rows: 2.0))
    drafter = taught(policy, [0] * 60, limit=3)
    depths = []
    for _ in range(100):
        (depth,) = policy.depths([drafter], ALONE)
        policy.note(drafter, depth, 0)
        depths.append(depth)
    assert set(depths) == {0, 1}
    assert 2 <= sum(depths) <= 4


def test_one_whose_drafts_failed_for_a_while_is_trusted_again() -> None:
    """Where those of all others stand: no trial is needed for it."""
    policy = MostTokensPerSecond(times_by(lambda rows: 10.0 + rows, lambda rows: 1.0))
    others = [Drafter(limit=3) for _ in range(4)]
    failed = taught(policy, [0] * 12, drafted=3, limit=3)
    for step in range(40):
        depths = policy.depths([*others, failed], ALONE)
        if step == 0:
            assert depths[-1] == 0
        for drafter, depth in zip(others, depths, strict=False):
            policy.note(drafter, depth, depth)
        policy.note(failed, 0, 0)
    assert chance(failed.survival, 0, 0.9) > 0.8
    assert policy.depths([*others, failed], ALONE)[-1] > 0


def test_nobody_is_tried_where_even_the_best_drafts_would_not_pay() -> None:
    policy = MostTokensPerSecond(times_by(lambda rows: float(rows), lambda rows: 0.6 * rows))
    drafter = taught(policy, [4] * 10, limit=3)
    for _ in range(100):
        (depth,) = policy.depths([drafter], ALONE)
        policy.note(drafter, depth, 0)
        assert depth == 0


@pytest.mark.parametrize("company", [Company(plain=16), Company(elsewhere=16), Company(plain=8, elsewhere=8)])
def test_one_that_drafts_slows_sixteen_others_by_a_thirtieth_at_most(company: Company) -> None:
    """Eight more tokens in a step of 17, for half as much time again: more in all, and less for the sixteen."""
    policy = MostTokensPerSecond(times_by(lambda rows: 10.0, lambda rows: 0.2))
    drafter = taught(policy, [8] * 60, drafted=8, limit=8)
    assert policy.depths([drafter], ALONE) == [8]
    assert policy.depths([drafter], company) == [1]
    dearer = MostTokensPerSecond(times_by(lambda rows: 10.0, lambda rows: 0.4))
    assert dearer.depths([taught(dearer, [8] * 60, drafted=8, limit=8)], company) == [0]


def test_one_that_drafts_pays_for_the_first_pass_and_what_precedes_it() -> None:
    """Shared by many it is nothing."""
    table = {sequences: {each: 1.0 + 0.001 * sequences * each for each in EACH} for sequences in NUMBERS}
    measured = Measured(table, dict.fromkeys(NUMBERS, 0.001), first=dict.fromkeys(NUMBERS, 0.2))
    policy = MostTokensPerSecond(StepTimes(measured))
    many = [taught(policy, [4] * 40) for _ in range(16)]
    assert policy.depths(many[:1], Company(plain=16)) == [0]
    assert policy.depths(many, ALONE) == [5] * 16


def test_many_that_draft_need_not_wait_for_one_that_does_not() -> None:
    policy = MostTokensPerSecond(times_by(lambda rows: 10.0, lambda rows: 0.6))
    drafters = [taught(policy, [8] * 60, drafted=8, limit=8) for _ in range(15)]
    assert min(policy.depths(drafters, Company(plain=1))) >= 4


def test_a_decision_holds_while_the_same_sequences_draft() -> None:
    policy = MostTokensPerSecond(flat())
    first, second = Drafter(limit=3), Drafter(limit=3)
    assert policy.depths([first], ALONE) == [3]
    assert policy.depths([first, second], ALONE) == [3, 3]
    second.limit = 1
    assert policy.depths([first, second], ALONE) == [3, 1]


def test_fixed_depths_are_the_limits() -> None:
    drafters = [Drafter(limit=0), Drafter(limit=5)]
    assert FixedDepth().depths(drafters, ALONE) == [0, 5]
    assert FixedDepth(2).depths(drafters, ALONE) == [0, 2]


def test_a_table_that_makes_drafts_too_dear_is_found_out() -> None:
    """Steps that draft one more than would pay, now and then, show what they take."""
    rows = {1: 1.0, 2: 1.05, 3: 1.1, 4: 1.15, 6: 1.2}
    wrong = Measured({1: {each: seconds if each < 3 else 2.5 * seconds for each, seconds in rows.items()}}, {1: 0.02})
    times, true = StepTimes(wrong), StepTimes(Measured({1: rows}, {1: 0.02}))
    policy, drafter, found = MostTokensPerSecond(times), Drafter(limit=5), []
    for _ in range(3000):
        (depth,) = policy.depths([drafter], ALONE)
        found.append(depth)
        policy.note(drafter, depth, depth)
        times.note_full(1, 1 + depth, 0, 0, true.full(1, depth)[depth])
        times.note_drafts([1] * depth, 0, [0.02] * depth)
    assert max(found[:5]) == 1
    assert sorted(found[-100:])[50] == 5


def test_a_table_that_makes_only_many_drafts_too_dear_is_found_out() -> None:
    """The first of them never pays, so that going one further shows nothing: now and then all are drafted."""
    rows = {1: 1.0, 2: 2.1, 3: 2.2, 4: 2.3, 6: 2.4}
    wrong = Measured({1: rows | {3: 3.6, 4: 4.4, 6: 4.9}}, {1: 0.02})
    times, true = StepTimes(wrong), StepTimes(Measured({1: rows}, {1: 0.02}))
    policy, drafter, found = MostTokensPerSecond(times), Drafter(limit=5), []
    for _ in range(200):
        (depth,) = policy.depths([drafter], ALONE)
        found.append(depth)
        policy.note(drafter, 5, 3)
        times.note_full(1, 1 + depth, 0, 0, true.full(1, depth)[depth])
        times.note_drafts([1] * depth, 0, [0.02] * depth)
    assert set(found[:5]) == {0}
    assert sorted(found[-100:])[50] >= 3


def test_nobody_explores_while_others_would_have_to_wait() -> None:
    policy = MostTokensPerSecond(dear())
    drafter = taught(policy, [4] * 10, limit=3)
    explored = [max(policy.depths([drafter], Company(elsewhere=1))) for _ in range(130)]
    assert set(explored) == {0}
