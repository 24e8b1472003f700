"""When a virtual shard is moved for the sake of balance: one move at an epoch, each loaded before it counts.

Load that is uneven by chance moves nothing: moves begin once the busiest shard has stayed above a mark for some
windows, and go on until it is well below. A move that is not loaded in time is given up; after that, or after one that
has not helped, no other begins for a while, twice as long each time. Plain data, no clock; all times are in seconds of
one clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from divisi.cluster.gang.membership.layout.balance import LEAST_GAIN, better, shares
from divisi.cluster.gang.membership.layout.leaf_loads import LeafLoads, Rows
from divisi.model.placement import Layout

MARK = 1.2
"""The busiest shard's load over the mean, above which moves begin."""
ENOUGH = 1.1
"""At which they end."""
WINDOWS = 3
"""As many in a row above the mark before the first move."""
LOADED_WITHIN_S = 120.0
_REST_S = 60.0
_LONGEST_REST_S = 3600.0


class Moves(Protocol):
    """What layouts there are; see `divisi.cluster.gang.membership.layout.layouts.Layouts`."""

    primary: Layout
    goal: Layout | None

    def aim(self, layout: Layout) -> None:
        """Serve this one once each of its seats holds what it is to serve."""
        ...

    def give_up(self) -> None:
        """Have no goal any more."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """An epoch that serves the primary layout while nobody loads or drops anything."""

    members: Collection[str]
    """Shards in it."""
    held: Mapping[int, Collection[int]]
    """Virtual shards by seat, copies too."""


@dataclass(frozen=True, slots=True)
class _Move:
    target: Layout
    since: float
    read: Mapping[str, float]
    """Bytes of weights that each shard had read before."""
    giver: int
    share: float
    """Its load before, over the mean."""


class Rebalancing:
    """Of one gang."""

    def __init__(self, leaves: int) -> None:
        """`leaves`: of the tree."""
        self.imbalance = 1.0
        """In the last window."""
        self.moves = self.given_up = 0
        self.moved_bytes = 0.0
        """That were read for the sake of moves."""
        self._loads = LeafLoads(leaves)
        self._above = 0
        """Windows in a row."""
        self._at_it = False
        """Moves have begun, and have not come to their end."""
        self._move: _Move | None = None
        self._last: _Move | None = None
        """Of which it is still to be seen whether it has helped."""
        self._rest_s, self._rest_until = _REST_S, 0.0

    def report(self, who: str, rows: Rows, now: float) -> None:
        """A shard has counted so many rows by virtual shard since it began."""
        self._loads.report(who, rows, now)

    def numbers(self) -> dict[str, float]:
        """For metrics."""
        return {
            "expert_imbalance": self.imbalance,
            "expert_moves": self.moves,
            "expert_moves_given_up": self.given_up,
            "expert_moved_bytes": self.moved_bytes,
        }

    def look(self, moves: Moves, settled: Settled | None, read: Mapping[str, float], now: float) -> bool:
        """Begin a move, or end one; whether there is another goal. `read`: bytes of weights by shard."""
        if self._move is not None:
            return self._follow(self._move, moves, read, now)
        if settled is None or moves.goal is not None:
            self._loads.clear()
            return False
        if (load := self._loads.window(settled.members)) is None:
            return False
        by_seat = shares(moves.primary, load)
        self.imbalance = max(by_seat)
        self._judge(moves.primary, by_seat, now)
        target = better(moves.primary, load, settled.held) if self._wants_a_move(now) else None
        if target is None:
            return False
        self._move = _Move(target, now, dict(read), by_seat.index(self.imbalance), self.imbalance)
        self._loads.clear()
        moves.aim(target)
        return True

    def _judge(self, layout: Layout, by_seat: list[float], now: float) -> None:
        last, self._last = self._last, None
        if last is None or last.target != layout:
            return
        if by_seat[last.giver] > last.share - LEAST_GAIN / 2:
            self._rest(now)
        else:
            self._rest_s = _REST_S

    def _rest(self, now: float) -> None:
        self._rest_until = now + self._rest_s
        self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)

    def _wants_a_move(self, now: float) -> bool:
        self._above = self._above + 1 if self.imbalance > MARK else 0
        self._at_it = self.imbalance > ENOUGH if self._at_it else self._above >= WINDOWS
        return self._at_it and now >= self._rest_until

    def _follow(self, move: _Move, moves: Moves, read: Mapping[str, float], now: float) -> bool:
        self._loads.clear()
        if moves.goal == move.target and now - move.since < LOADED_WITHIN_S:
            return False
        self._move = None
        self.moved_bytes += sum(max(read.get(who, 0.0) - before, 0.0) for who, before in move.read.items())
        if moves.goal == move.target:
            moves.give_up()
            self.given_up += 1
            self._rest(now)
            return True
        if moves.primary == move.target:  # and no other number of shards was asked for
            self.moves += 1
            self._last = move
        return False
