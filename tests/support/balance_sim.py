"""A coordinator whose gang is simulated, second by second: shards that load late and count rows by seeded chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.seats import Address, GangShape, Membership
from divisi.model.placement import Layout

LEAF_BYTES = 100


@dataclass
class SimShard:
    """What it holds in truth: it drops at once what it is told to drop, and loads some time later."""

    index: int
    leaves: frozenset[int]
    rows: Counter[int] = field(default_factory=Counter)
    read: int = 0
    order: Directive | None = None
    ready_at: float = 0.0


class SimGang:
    """One worker, and shards whose virtual shards get rows by given weights."""

    def __init__(
        self, shards: int, weights: Sequence[float], seed: int, copies: int = 0, loads_s: float = 2.0, rows: int = 500
    ) -> None:
        """`loads_s`: how long loading takes; `rows`: by second, in measured steps."""
        self.now, self.rng, self.weights, self.per_second = 0.0, random.Random(seed), list(weights), rows
        self.loads_s = loads_s
        self.coordinator = Coordinator(
            GangShape(1, shards), Address("h", 1), lease_s=1e9, grace_s=1e9, clock=lambda: self.now,
            virtual_shards=len(weights), copies=copies, rebalance=True,
        )  # fmt: skip
        self.coordinator.join("worker", "attention", Address("h"))
        self.shards = {}
        for index, own in enumerate(Layout.even(len(weights), shards).served):
            name = f"e{index}"
            self.shards[name] = SimShard(index, frozenset(own))
            self.coordinator.join(name, "expert", Address("h", process=name), index, held=frozenset(own))
        self.layouts: list[Layout] = []
        """Of all epochs."""
        self.inside: Membership | None = None
        self.poll()

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            self.serve()
            self.poll()

    def serve(self) -> None:
        """Rows of a second, counted by whoever serves them."""
        if self.inside is not None and self.inside.layout is not None:
            server = self.inside.layout.server
            for leaf in self.rng.choices(range(len(self.weights)), self.weights, k=self.per_second):
                self.shards[f"e{server[leaf]}"].rows[leaf] += 1

    def poll(self) -> None:
        """Everybody asks until nobody is told anything new."""
        told = True
        while told:
            told = self.follow("worker", self.coordinator.poll("worker", 0.0))
            for name, shard in self.shards.items():
                self.load(name, shard)
                rows = {str(leaf): float(count) for leaf, count in shard.rows.items()}
                stats = {"weight_bytes_read": float(shard.read), "leaf_rows": rows}
                told |= self.follow(name, self.coordinator.poll(name, 0.0, stats))

    def load(self, name: str, shard: SimShard) -> None:
        if shard.order is not None and self.now >= shard.ready_at:
            order, shard.order = shard.order, None
            shard.read += LEAF_BYTES * len(order.leaves - shard.leaves)
            shard.leaves = order.leaves
            self.coordinator.push_stats(name, {"weight_bytes_read": float(shard.read)})
            self.coordinator.prepared(name, order.order)

    def follow(self, name: str, directive: Directive) -> bool:
        match directive.action:
            case "enter":
                self.enter(directive.membership)
                self.coordinator.serving(name, directive.epoch)
            case "change":
                self.inside = None
                for other in ("worker", *self.shards):
                    self.coordinator.left(other, directive.epoch, "its membership changes")
            case "prepare":
                shard = self.shards[name]
                shard.leaves &= directive.leaves
                shard.order, shard.ready_at = directive, self.now + self.loads_s
        return directive.action != "stay"

    def enter(self, membership: Membership | None) -> None:
        assert membership is not None
        assert membership.layout is not None
        if self.inside == membership:
            return
        for shard in self.shards.values():
            lacking = set(membership.layout.served[shard.index]) - shard.leaves
            assert not lacking, f"expert:{shard.index} is to serve {lacking}, which it has not loaded"
        if self.layouts:
            check_step(self.layouts[-1], membership.layout)
        self.inside = membership
        self.layouts.append(membership.layout)

    def number(self, name: str) -> float:
        """One of the coordinator's."""
        value = self.coordinator.numbers()[name]
        assert isinstance(value, (int, float))
        return value


def check_step(before: Layout, after: Layout) -> None:
    """One virtual shard goes to another seat, and at most one comes back for it."""
    gone = {(old, new) for old, new in zip(before.server, after.server, strict=True) if old != new}
    count = sum(old != new for old, new in zip(before.server, after.server, strict=True))
    assert count <= 2, f"{count} virtual shards move in one epoch"
    assert count < 2 or (len(gone) == 2 and gone == {(new, old) for old, new in gone}), f"two moves at once: {gone}"
