"""How many tokens are drafted for whom: plain Python, without torch or a clock.

Each draft that stands is one token more from a step, and each costs a row in the full pass and one in a draft pass.
What rows cost is measured, never assumed: two tokens touch twice the experts of one, forty mostly the same, and at some
sizes kernels change. How likely a draft is to stand is learnt from those before it, by sequence and position.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from divisi.cluster.passes import PassKind

MOST_DRAFTS = 8
_PRIOR = 4.0
"""Trials that what is known of all sequences counts for, in a new one."""
_FADE = 0.9
"""What a trial still counts when the next one has come."""
_FIRST_GUESS = 0.7
_PROBE_EVERY = 32
"""Steps without a draft after which one is drafted to see how it fares: where nothing is drafted, nothing is learnt."""
_WEIGHT = 0.1
"""Of one measured step in the table."""


class StepTimes:
    """Seconds of a pass by its rows: measured at some sizes, in proportion between them, and kept up to date."""

    def __init__(self, measured: Mapping[PassKind, Mapping[int, float]]) -> None:
        self._rows = {kind: sorted(times) for kind, times in measured.items()}
        self._seconds = {kind: [times[rows] for rows in sorted(times)] for kind, times in measured.items()}
        self._scale = dict.fromkeys(measured, 1.0)

    def of(self, kind: PassKind, rows: int) -> float:
        """Seconds of a pass with so many rows; past the largest that was measured, in proportion to it."""
        return self._scale[kind] * self._table(kind, rows)

    def note(self, kind: PassKind, rows: int, seconds: float) -> None:
        """A pass took so long: what others cost on the way, and longer texts, show here alone."""
        ratio = seconds / max(self._table(kind, rows), 1e-9)
        self._scale[kind] += _WEIGHT * (min(max(ratio, 0.1), 10.0) - self._scale[kind])

    def _table(self, kind: PassKind, rows: int) -> float:
        known, seconds = self._rows[kind], self._seconds[kind]
        place = bisect_left(known, rows)
        if place == len(known):
            return seconds[-1] * rows / known[-1]
        if place == 0 or known[place] == rows:
            return seconds[place]
        share = (rows - known[place - 1]) / (known[place] - known[place - 1])
        return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])


@dataclass(slots=True)
class Survival:
    """How often drafts stood, by position, those before them standing too; older trials count less."""

    stood: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    tried: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)

    def note(self, drafted: int, accepted: int) -> None:
        """So many were drafted in a step, and the first of them accepted."""
        for place in range(min(accepted + 1, drafted)):
            self.tried[place] = self.tried[place] * _FADE + 1.0
            self.stood[place] = self.stood[place] * _FADE + (place < accepted)

    def chance(self, place: int, prior: float) -> float:
        """That the draft at a position stands if those before it do; `prior` is how likely that is in general."""
        return (self.stood[place] + _PRIOR * prior) / (self.tried[place] + _PRIOR)


@dataclass(slots=True)
class Drafter:
    """What is known of one sequence's drafts."""

    survival: Survival = field(default_factory=Survival)
    idle_steps: int = 0
    """Since it drafted last."""


class DraftPolicy(Protocol):
    """Decides how many tokens each of some sequences drafts in a step."""

    def depths(self, drafters: Sequence[Drafter], limits: Sequence[int], rows: int) -> list[int]:
        """Drafts for each, at most its limit; `rows` are those that the full pass has anyway."""
        ...

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """A step of a sequence is committed."""
        ...


class FixedDepth:
    """As many as the limits allow."""

    def depths(self, drafters: Sequence[Drafter], limits: Sequence[int], rows: int) -> list[int]:
        """See DraftPolicy."""
        return list(limits)

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """See DraftPolicy."""


class MostTokensPerSecond:
    """The drafts with which the batch's expected tokens per second are highest, by the table of step times."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._all = Survival()

    def depths(self, drafters: Sequence[Drafter], limits: Sequence[int], rows: int) -> list[int]:
        """See DraftPolicy. The likeliest come first; costs jump, so that every number of them is looked at."""
        chances = [self._chances(drafter, limit) for drafter, limit in zip(drafters, limits, strict=True)]
        slots = sorted(
            ((chance, place, index) for index, of_one in enumerate(chances) for place, chance in enumerate(of_one)),
            key=lambda slot: (-slot[0], slot[1]),
        )
        passes = [0] * MOST_DRAFTS
        tokens, drafting = float(len(drafters)), 0.0
        best, taken = tokens / self._times.of(PassKind.FULL, rows), 0
        for count, (chance, place, _) in enumerate(slots, 1):
            tokens += chance
            drafting -= self._draft_seconds(passes[place])
            passes[place] += 1
            drafting += self._draft_seconds(passes[place])
            rate = tokens / (drafting + self._times.of(PassKind.FULL, rows + count))
            if rate > best:
                best, taken = rate, count
        depths = [0] * len(drafters)
        for _, _, index in slots[:taken]:
            depths[index] += 1
        return [self._probed(*each) for each in zip(drafters, depths, limits, strict=True)]

    def note(self, drafter: Drafter, drafted: int, accepted: int) -> None:
        """See DraftPolicy."""
        if not drafted:
            drafter.idle_steps += 1
            return
        drafter.idle_steps = 0
        drafter.survival.note(drafted, accepted)
        self._all.note(drafted, accepted)

    def _chances(self, drafter: Drafter, limit: int) -> list[float]:
        """That the first 1, 2, ... drafts all stand."""
        found, all_stand = [], 1.0
        for place in range(limit):
            all_stand *= drafter.survival.chance(place, self._all.chance(place, _FIRST_GUESS))
            found.append(all_stand)
        return found

    def _draft_seconds(self, rows: int) -> float:
        return self._times.of(PassKind.DRAFT, rows) if rows else 0.0

    @staticmethod
    def _probed(drafter: Drafter, depth: int, limit: int) -> int:
        return 1 if not depth and limit and drafter.idle_steps >= _PROBE_EVERY else depth
