"""Seats and epochs in random histories, against what must hold after each step of them."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.seats import Address, GangShape, Membership
from tests.support.rosters import STORE

STEPS = 600
WHAT_HAPPENS = ("join", "loaded", "poll", "poll", "poll", "left", "leave", "retire", "stale", "silent")


class History:
    """One gang: holders come and load, do what they are told sooner or later, break epochs off, fall silent and go."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seed = random.Random(seed), f"seed {seed}"
        self.shape = GangShape(self.rng.randint(1, 3), self.rng.randint(0, 3))
        self.least = self.rng.randint(1, self.shape.attention_workers)
        self.roster = Roster(self.shape, STORE, lease_s=5.0, grace_s=1.0, min_attention_workers=self.least)
        self.now, self.names, self.last_epoch = 0.0, 0, 0
        self.known: list[str] = []
        """Who has, or had, a seat, as far as they know themselves."""
        self.inside: dict[str, int] = {}
        """Who is in an epoch, and in which."""

    def step(self) -> None:
        self.now += self.rng.random() * 0.4
        match self.rng.choice(WHAT_HAPPENS):
            case "join":
                self.join()
            case "loaded" if self.known:
                self.roster.loaded(self.rng.choice(self.known))
            case "poll" if self.known:
                for holder_id in self.rng.sample(self.known, len(self.known)):
                    self.poll(holder_id)
            case "left" if self.inside:
                self.break_off()
            case "leave" if self.known and self.rng.random() < 0.1:
                self.roster.leave(self.rng.choice(self.known), "bye", self.now)
            case "retire" if self.known and self.rng.random() < 0.2:
                self.roster.retire(self.rng.choice(self.known))
            case "stale" if self.known:
                self.roster.left(self.rng.choice(self.known), self.last_epoch + 10, "stale", self.now)
            case "silent":
                self.roster.expire(self.now)
        self.check()

    def join(self) -> None:
        self.names += 1
        name = f"h{self.names}"
        role = self.rng.choice(["attention", "expert"]) if self.shape.expert_shards else "attention"
        index = self.rng.randrange(self.shape.expert_shards) if role == "expert" else None
        loading = role == "attention" and self.rng.random() < 0.3
        if self.roster.join(name, role, Address("h"), self.now, index, loading) is not None:
            self.known.append(name)

    def poll(self, holder_id: str) -> None:
        self.roster.beat(holder_id, self.now)
        directive = self.roster.directive(holder_id)
        match directive.action:
            case "enter":
                assert holder_id not in self.inside, f"{self.seed}: sent into two epochs at once"
                self.inside[holder_id] = directive.epoch
                self.roster.serving(holder_id, directive.epoch)
            case "leave" if self.rng.random() < 0.7:
                assert self.inside.pop(holder_id) == directive.epoch
                self.roster.left(holder_id, directive.epoch, "told to", self.now)
            case "change":
                self.change(holder_id, directive.epoch)
            case "rejoin":
                self.known.remove(holder_id)
                self.inside.pop(holder_id, None)

    def change(self, leader: str, epoch: int) -> None:
        """All leave between two steps."""
        assert self.roster.membership is not None
        assert self.roster.membership.holders[0] == leader, f"{self.seed}: only the leader is told"
        for member in self.roster.membership.holders:
            if self.inside.pop(member, None):
                self.roster.left(member, epoch, "its membership changes", self.now)

    def break_off(self) -> None:
        holder_id = self.rng.choice(sorted(self.inside))
        blamed = self.rng.choice([None, *map(str, self.shape.seats)])
        self.roster.left(holder_id, self.inside.pop(holder_id), "abort", self.now, blamed)

    def check(self) -> None:
        holders = {h.holder_id: h for h in self.roster.holders()}
        seats = [h.seat for h in holders.values()]
        assert len(set(seats)) == len(seats) <= self.shape.size, self.seed
        if self.roster.membership is not None:
            self.check_epoch(self.roster.membership, holders)
        assert self.roster.ready() <= (self.roster.membership is not None), self.seed

    def check_epoch(self, current: Membership, holders: dict[str, Holder]) -> None:
        members = [holders[holder_id] for holder_id in current.holders]
        assert [member.seat for member in members] == list(current.seats), self.seed
        assert len(current.workers) >= self.least, self.seed
        assert len(current.shards) == self.shape.expert_shards, f"{self.seed}: not all experts are covered"
        assert current.epoch >= self.last_epoch, self.seed
        if current.epoch > self.last_epoch:
            assert not any(member.retiring for member in members), self.seed
        self.last_epoch = current.epoch
        assert {member.epoch for member in members} <= {0, current.epoch}, self.seed
        late = [h for h in holders.values() if h.epoch not in (0, current.epoch)]
        assert all(h.suspected for h in late), f"{self.seed}: somebody was not waited for"
        assert not any(member.loading for member in members), f"{self.seed}: an epoch without somebody's weights"

    def end(self) -> None:
        """Left alone, with every seat refilled, the gang always comes back."""
        for holder in list(self.roster.holders()):
            if holder.retiring:
                self.roster.leave(holder.holder_id, "bye", self.now)
        for seat in self.shape.seats:
            index = seat.index if seat.role == "expert" else None
            self.roster.join(f"last-{seat}", seat.role, Address("h"), self.now, index)
        for holder in list(self.roster.holders()):
            self.roster.loaded(holder.holder_id)
            self.roster.left(holder.holder_id, holder.epoch, "end", self.now)
        assert self.roster.membership is not None, f"{self.seed}: {self.roster.explain()}"


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_keep_the_invariants(seed: int) -> None:
    history = History(seed)
    for _ in range(STEPS):
        history.step()
    history.end()
