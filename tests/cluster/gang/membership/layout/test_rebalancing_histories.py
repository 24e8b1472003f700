"""Virtual shards that are moved while shards scale, are copied and die, and coordinators follow on each other: random
histories."""

from __future__ import annotations

import pytest

from divisi.cluster.gang.membership.layout.balance import better, most_leaves
from divisi.cluster.gang.membership.layout.layouts import Layouts
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.seats import GangShape
from tests.support.rosters import STORE

from .test_scaling_histories import LEAVES, History, _goal_counts_at_once

HISTORIES = 60


class MovingHistory(History):
    """Any load is found now and then, and any move is given up."""

    moved = given_up = 0

    def new_roster(self, shards: int, gather_until: float | None = None) -> Roster:
        return Roster(
            GangShape(1, shards), STORE, lease_s=1e6, grace_s=1e6, first_epoch=1 + int(self.now * 1e6),
            gather_until=gather_until, now=self.now, virtual_shards=LEAVES, copies=self.copies, rebalance=True,
        )  # fmt: skip

    def step(self) -> None:
        moves, settled = self.roster.plan.moves, self.roster.settled
        assert moves is not None
        if settled is not None and self.rng.random() < 0.5:
            load = [self.rng.expovariate(1.0) for _ in range(LEAVES)]
            if (target := better(moves.primary, load, settled.held)) is not None:
                moves.aim(target)
                self.moved += 1
        elif moves.goal is not None and len(moves.goal.served) == len(moves.primary.served) and self.rng.random() < 0.1:
            moves.give_up()
            self.given_up += 1
        super().step()
        sizes = [len(own) for own in moves.primary.served]
        if min(sizes) < 1 or max(sizes) > most_leaves(LEAVES, len(sizes)):
            self.fail(f"{sizes} are served")

    def end(self) -> None:
        """By an even deal, since another number of shards is asked for."""
        served = self.roster.plan.served_shape.expert_shards
        self.wanted = served % 5 + 1
        self.roster.scale(self.wanted, self.now)
        super().end()


def follow_many() -> None:
    histories = [MovingHistory(seed) for seed in range(HISTORIES)]
    for history in histories:
        for _ in range(250):
            history.step()
        history.end()
    assert sum(history.moved for history in histories) > HISTORIES, "little was moved"
    assert sum(history.given_up for history in histories) > 0, "nothing was given up"


def test_random_histories_with_moves() -> None:
    follow_many()


def test_they_find_a_move_that_counts_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layouts, "choose", _goal_counts_at_once)
    with pytest.raises((AssertionError, ValueError), match=r"history|take part"):
        follow_many()
