"""A gang whose experts scale, are copied and die, in random histories against what is truly held; and wrong rules,
which these histories find."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.layout.layouts import Holdings, Layouts
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.vacancies import Applicant
from divisi.cluster.seats import Address, GangShape, Membership, Seat
from divisi.model.placement import Layout
from tests.support.rosters import STORE

LEAVES = 12
HISTORIES = 40


@dataclass
class Process:
    """A shard's, and what it holds in truth: it drops at once what it is told to drop, and loads some time later."""

    name: str
    seat: int
    leaves: frozenset[int]
    orders: list[Directive] = field(default_factory=list)
    reports: list[int] = field(default_factory=list)
    """On the way."""
    inside: Membership | None = None

    def told(self, directive: Directive) -> None:
        self.leaves &= directive.leaves
        self.orders.append(directive)

    def load(self) -> None:
        if self.orders:
            self.leaves = self.orders[-1].leaves
            self.reports.append(self.orders[-1].order)
            self.orders.clear()


class History:
    """One gang: a worker that never dies, and shards that do."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seed, self.now, self.names = random.Random(seed), seed, 0.0, 0
        self.shards, self.copies = self.rng.randint(1, 4), self.rng.choice([0, 0, 1, 2])
        self.roster = self.new_roster(self.shards)
        self.processes: dict[str, Process] = {}
        self.worker = Process("worker", 0, frozenset())
        self.roster.join("worker", "attention", Address("h"), 0.0)
        self.wanted = self.shards
        self.last: Membership | None = None

    def new_roster(self, shards: int, gather_until: float | None = None) -> Roster:
        return Roster(
            GangShape(1, shards), STORE, lease_s=1e6, grace_s=1e6, first_epoch=1 + int(self.now * 1e6),
            gather_until=gather_until, now=self.now, virtual_shards=LEAVES, copies=self.copies,
        )  # fmt: skip

    def fail(self, text: str) -> None:
        raise AssertionError(f"history {self.seed}: {text}")

    def start(self) -> None:
        """A process that waits for a share gets one, loads it, joins; all at once, or it died before."""
        self.names += 1
        name = f"p{self.names}"
        share = None
        for _ in range(2):
            share = self.roster.vacancy(Applicant(name, "abc"[self.names % 3]), self.now)
        if share is None:
            return
        process = Process(name, share.index, share.leaves)
        address = Address("abc"[self.names % 3], process=name)
        if self.roster.join(name, "expert", address, self.now, share.index, held=process.leaves) is None:
            self.fail(f"{share} was promised, and is another's")
        self.processes[name] = process

    def poll(self) -> None:
        for process in self.rng.sample([self.worker, *self.processes.values()], 1 + len(self.processes)):
            directive = self.roster.directive(process.name)
            match directive.action:
                case "enter":
                    process.inside = directive.membership
                    self.roster.serving(process.name, directive.epoch)
                case "leave" if process.inside is not None:
                    self.leave(process, "told to")
                case "change":
                    for other in (self.worker, *self.processes.values()):
                        if other.inside is not None and other.inside.epoch == directive.epoch:
                            self.leave(other, "its membership changes")
                case "prepare":
                    process.told(directive)
                case "rejoin":
                    self.processes.pop(process.name)
            self.check()

    def leave(self, process: Process, reason: str) -> None:
        assert process.inside is not None
        inside, process.inside = process.inside, None
        self.roster.left(process.name, inside.epoch, reason, self.now)

    def restart(self) -> None:
        """The coordinator is another one, and knows no more than how many there were and are to be."""
        served = self.roster.plan.served_shape.expert_shards
        self.roster = self.new_roster(served, gather_until=self.now + 100.0)
        self.roster.scale(self.wanted, self.now)
        for process in self.rng.sample([self.worker, *self.processes.values()], 1 + len(self.processes)):
            seat = Seat("attention" if process is self.worker else "expert", process.seat)
            if self.rng.random() < 0.1 and process is not self.worker:
                self.processes.pop(process.name)
                continue
            process.orders.clear()
            process.reports.clear()
            address = Address("h", process=process.name)
            if not self.roster.resume(process.name, seat, address, self.now, process.inside, held=process.leaves):
                self.processes.pop(process.name)
            elif process.inside is not None:
                self.roster.serving(process.name, process.inside.epoch)
        if self.roster.gathering:
            self.now += 101.0
            self.roster.expire(self.now)

    def step(self) -> None:
        self.now += self.rng.random()
        processes = list(self.processes.values())
        match self.rng.choice(["start", "poll", "poll", "poll", "load", "report", "die", "abort", "scale", "restart"]):
            case "start":
                self.now += 6.0  # whoever comes may take any seat
                self.start()
            case "poll":
                self.poll()
            case "load" if processes:
                self.rng.choice(processes).load()
            case "report" if processes:
                process = self.rng.choice(processes)
                if process.reports:
                    self.roster.prepared(process.name, process.reports.pop(0))
            case "die" if processes and self.rng.random() < 0.3:
                self.roster.ended(self.processes.pop(self.rng.choice(processes).name).name, self.now)
            case "abort":
                inside = [process for process in (self.worker, *processes) if process.inside is not None]
                if inside and self.rng.random() < 0.3:
                    self.leave(self.rng.choice(inside), "abort")
            case "scale" if self.rng.random() < 0.2:
                self.wanted = self.rng.randint(1, 5)
                self.roster.scale(self.wanted, self.now)
            case "restart" if self.rng.random() < 0.1:
                self.restart()
        self.check()

    def check(self) -> None:
        current = self.roster.membership
        if current is None or current == self.last:
            return
        self.last = current
        assert current.layout is not None
        for name, seat in zip(current.holders, current.seats, strict=True):
            if seat.role == "attention":
                continue
            served = set(current.layout.served[seat.index])
            if not served:
                self.fail(f"{seat} is there for nothing")
            process = self.processes[name]
            if not served <= process.leaves:
                self.fail(f"{seat} serves {sorted(served - process.leaves)}, which it does not hold")

    def end(self) -> None:
        """Left alone, with whoever is wanted, the gang serves as was asked for, and holds no more."""
        for _ in range(60):
            self.now += 100.0
            self.start()
            for process in list(self.processes.values()):
                process.load()
                while process.reports:
                    self.roster.prepared(process.name, process.reports.pop(0))
            self.poll()
        current = self.roster.membership
        if current is None or current.layout is None or not self.roster.ready():
            self.fail(self.roster.explain())
        assert current is not None
        assert current.layout is not None
        sizes = [len(own) for own in current.layout.served]
        if len(sizes) != self.wanted or max(sizes) - min(sizes) > 1:
            self.fail(f"{self.wanted} were asked for: {current.layout}")
        held = [len(self.processes[name].leaves) for name in current.holders[1:]]
        if sum(held) != LEAVES * (1 + min(self.copies, self.wanted - 1)):
            self.fail(f"{held} are held")
        if len(self.processes) != self.wanted:
            self.fail(f"{len(self.processes)} hold seats")


def follow_many() -> None:
    for seed in range(HISTORIES):
        history = History(seed)
        for _ in range(250):
            history.step()
        history.end()


def test_random_histories() -> None:
    follow_many()


def _serves_anyway(layouts: Layouts, holdings: Holdings) -> Layout | None:
    return layouts.goal or layouts.primary


def _goal_counts_at_once(layouts: Layouts, holdings: Holdings) -> Layout | None:
    return (CHOOSE(layouts, holdings) and layouts.goal) or CHOOSE(layouts, holdings)


def _by_the_first(layouts: Layouts, holdings: Holdings) -> Layout | None:
    served = [list(own) if seat in holdings else [] for seat, own in enumerate(layouts.primary.served)]
    there = [seat for seat in range(len(served)) if seat in holdings]
    if not there:
        return None
    lost = [leaf for seat, own in enumerate(layouts.primary.served) if seat not in holdings for leaf in own]
    served[there[0]] = sorted(served[there[0]] + lost)
    return Layout(LEAVES, tuple(map(tuple, served)))


def _keeps_what_it_is_to_drop(holder: Holder, leaves: frozenset[int], order: int) -> None:
    holder.told, holder.order = leaves, order


def _any_report_counts(holder: Holder, order: int) -> None:
    holder.held = holder.told


CHOOSE = Layouts.choose


@pytest.mark.parametrize(
    ("owner", "name", "rule"),
    [
        (Layouts, "choose", _serves_anyway),
        (Layouts, "choose", _goal_counts_at_once),
        (Layouts, "_cover", _by_the_first),
        (Holder, "tell", _keeps_what_it_is_to_drop),
        (Holder, "prepared", _any_report_counts),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_these_histories_find_a_wrong_rule(
    owner: type, name: str, rule: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, rule)
    with pytest.raises((AssertionError, ValueError), match=r"history|take part"):
        follow_many()
