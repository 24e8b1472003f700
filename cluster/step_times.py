"""What steps take, by what is in them: measured, interpolated, and kept up to date. Plain Python.

Seconds of a draft pass depend on its rows, and on whether it is a step's first: that one finds the layer's weights in
no cache, and what lays out all of them counts with it. Those of all else in a step (planning, the full pass, choosing
tokens) depend on how many sequences decode and on the rows of each: two tokens touch twice the experts of one, forty
mostly the same, at some sizes kernels change, and each sequence has a state to be read and written whatever its rows.
To both comes what attention reads: the tokens before each row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_WEIGHT = 0.1
"""Of one step in the factors that follow what steps take."""
_LONGEST, _SHORTEST = 1.5, 0.5
"""Times the expected that one step may count as: a process that was put aside for a while says nothing of steps."""
_DISTURBED = 0.25
"""What a correction to longer times counts for, beside one to shorter: whatever disturbs a step makes it longer."""
_CORRECTION = 0.1
"""Of what an unusual step took beside what was expected of it, in the table; more where few steps have been."""
_READING_CORRECTION = 0.3
"""The same of what reading costs, which one kind of step was measured for."""
_MEASURED_STEPS = 2
"""Steps at a place that its measurement counts for."""
_ALIKE_EVERY = 4
"""Of steps that are like the one before, so many are noted once: noting takes a small model's layer's time."""
_ANEW_EVERY = 16
"""Steps after which corrections count: until then lists of times are kept."""


class Reading(NamedTuple):
    """Seconds that a row takes longer for each token before it."""

    first: float = 0.0
    """The first row of a sequence in a full pass."""
    more: float = 0.0
    """Each further one, which shares the reading."""
    draft: float = 0.0
    """A row of a draft pass."""


_FIRST, _MORE, _DRAFT = range(len(Reading._fields))


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of steps that have run."""

    full: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    """Of all but drafts, by decoding sequences and rows of each, at the beginning of their texts."""
    draft: Mapping[int, float] = field(default_factory=dict)
    """Of a draft pass after a step's first, by its rows."""
    reading: Reading = field(default_factory=Reading)
    first: Mapping[int, float] = field(default_factory=dict)
    """Of a step's first draft pass with all that precedes it, by its rows; empty: as the others."""


class StepTimes:
    """The table, a factor on each part of it, and what follows from both.

    A step like the one before it that takes longer than expected says that the machine has become slower: the factor
    follows. One of other size than that before it, or with far more or less to read, says that the table is wrong
    there: the table does, and what reading costs, each as much as it is of what was expected.
    """

    def __init__(self, measured: Measured | None = None) -> None:
        self._full: dict[int, _Curve] = {}
        self._drafts = _DraftTimes({}), _DraftTimes({})
        """Of a step's first draft pass, and of each further one."""
        self._full_scale = 1.0
        self._rows: dict[int, list[float]] = {}
        """Of the full pass by sequences, then by rows past the first of each; without the factor."""
        self._reading = [0.0] * len(Reading._fields)
        """What reading costs, without the factors."""
        self._before: tuple[_Places, int] | None = None
        """Of the last step, and the tokens before the first rows of its sequences."""
        self._read_before: int | None = None
        """By the last step's drafts."""
        self._last = (0, 0, 0)
        """Sequences, rows and what was read before them, of the last step that was due."""
        self._alike = 0
        """Steps like it since."""
        self._known: dict[tuple[int, int], _Places] = {}
        """By sequences and rows."""
        self._noted = 0
        self.measured = Measured()
        self.learn(measured or Measured())

    @property
    def is_known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._full) and self._drafts[1].is_known

    @property
    def reading(self) -> Reading:
        """As it is now."""
        first, more, draft = self._reading
        return Reading(first * self._full_scale, more * self._full_scale, draft * self._drafts[1].scale)

    def learn(self, measured: Measured) -> None:
        """Take over a table; empty: nothing is known."""
        self.measured = measured
        self._full = {sequences: _Curve(by_rows) for sequences, by_rows in sorted(measured.full.items()) if by_rows}
        self._drafts = _DraftTimes(measured.first or measured.draft), _DraftTimes(measured.draft)
        self._reading = [*measured.reading]
        self._rows.clear()
        self._known.clear()
        self._before = self._read_before = None

    def full(self, sequences: int, most: int) -> list[float]:
        """Seconds of all but drafts with 0, 1, ... `most` rows, or more, besides one of each sequence."""
        scale = self._full_scale
        return [scale * seconds for seconds in self._of(sequences, most)]

    def draft(self, most: int) -> list[float]:
        """Seconds of a draft pass after a step's first with 0, 1, ... `most` rows, or more."""
        return self._drafts[1].now(most)

    def first_draft(self, most: int) -> list[float]:
        """The same of a step's first one, with all that precedes it."""
        return self._drafts[0].now(most)

    def prefill(self, rows: int) -> float:
        """What rows of prefills add to a step, about: each as much as in the largest that was measured."""
        sequences = next(reversed(self._full))
        each, seconds = self._full[sequences].last
        return self._full_scale * rows * seconds / (sequences * each)

    def is_due(self, sequences: int, rows: int, read_first: int) -> bool:
        """Whether a step that was like this is to be noted."""
        known, read = self._last[:2], self._last[2]
        if (sequences, rows) == known and _alike(read, read_first) and self._alike < _ALIKE_EVERY - 1:
            self._alike += 1
            return False
        self._last, self._alike = (sequences, rows, read_first), 0
        return True

    def note_full(self, sequences: int, rows: int, read_first: int, read_more: int, seconds: float) -> None:
        """All but the drafts of a step took so long: what others cost on the way shows here.

        `read_first`, `read_more`: tokens before the first row of each sequence, and before all others.
        """
        if not self.is_known:
            return
        if (places := self._known.get((sequences, rows))) is None:
            places = self._known[sequences, rows] = self._places(sequences, rows / sequences)
        read = self._reading[_FIRST] * read_first, self._reading[_MORE] * read_more
        expected = sum([weight * curve.seconds[index] for curve, index, weight, _ in places.around]) + sum(read)
        before, self._before = self._before, (places, read_first)
        if before is None or (before[0].between == places.between and _alike(before[1], read_first)):
            self._full_scale = _followed(self._full_scale, seconds / expected)
        else:
            ratio = min(max(seconds / (self._full_scale * expected), _SHORTEST), _LONGEST)
            self._correct(places, ratio, 1 - sum(read) / expected)
            for part, own in zip((_FIRST, _MORE), read, strict=True):
                self._correct_reading(part, ratio, own / expected)
        for curve, index, _, share in places.around:
            curve.steps[index] += share
        self._noted += 1
        if self._noted % _ANEW_EVERY == 0:
            self._rows.clear()

    def note_drafts(self, rows: Sequence[int], read: int, seconds: Sequence[float]) -> None:
        """The draft passes of a step took so long; `rows` of each, the first has the most; `read`: tokens before all
        rows of all passes.
        """
        if not self.is_known or not rows:
            return
        (first, *further), each = rows, self._reading[_DRAFT] * read / sum(rows)
        self._drafts[0].note([first], each * first, seconds[0])
        if not further:
            return
        reading, spent = each * sum(further), sum(seconds[1:])
        before, self._read_before = self._read_before, read
        if before is None or _alike(before, read):
            self._drafts[1].note(further, reading, spent)
        else:
            expected = self._drafts[1].expected(further) + self._drafts[1].scale * reading
            ratio = min(max(spent / expected, _SHORTEST), _LONGEST)
            self._correct_reading(_DRAFT, ratio, self._drafts[1].scale * reading / expected)

    def _of(self, sequences: int, most: int) -> list[float]:
        rows = self._rows.get(sequences, [])
        if len(rows) <= most:
            rows = [self._table(sequences, sequences + more) for more in range(most + 1)]
            self._rows[sequences] = rows
        return rows

    def _places(self, sequences: int, each: float) -> _Places:
        beyond = max(sequences / next(reversed(self._full)), 1.0)
        between, around = [], []
        for known, share in self._curves(sequences).items():
            curve = self._full[known]
            further = beyond * max(each / curve.places[-1], 1.0)
            for index, part in _around(curve.places, each).items():
                between.append((known, index))
                around.append((curve, index, share * part * further, share * part))
        return _Places(between, around)

    def _correct(self, places: _Places, ratio: float, part: float) -> None:
        """`ratio`: what a step took to what was expected of it, of which so large a part comes from these places. Those
        that few steps were at are to blame first.
        """
        blame = [share / (1 + curve.steps[index]) for curve, index, _, share in places.around]
        for (curve, index, *_), own in zip(places.around, blame, strict=True):
            followed = _trusted(ratio) * max(_CORRECTION, 1 / (_MEASURED_STEPS + curve.steps[index]))
            curve.seconds[index] *= 1 + followed * part * own / sum(blame) * (ratio - 1)

    def _correct_reading(self, index: int, ratio: float, part: float) -> None:
        self._reading[index] *= 1 + _trusted(ratio) * _READING_CORRECTION * part * (ratio - 1)

    def _table(self, sequences: int, rows: int) -> float:
        each, last = rows / sequences, next(reversed(self._full))
        seconds = sum([share * self._full[known].at(each) for known, share in self._curves(sequences).items()])
        return seconds * max(sequences / last, 1.0)

    def _curves(self, sequences: int) -> dict[int, float]:
        """The numbers of sequences that were measured around this one, and how much each counts."""
        known = [*self._full]
        return {known[index]: share for index, share in _around(known, sequences).items()}


class _DraftTimes:
    """Seconds of one kind of draft pass by its rows, and a factor on them."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self._curve = _Curve(measured)
        self._by_rows = [0.0]
        """Without the factor."""
        self.scale = 1.0

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._curve.places)

    def now(self, most: int) -> list[float]:
        """With 0, 1, ... `most` rows, or more."""
        known = self._by_rows
        known += [self._curve.at(rows) for rows in range(len(known), most + 1)]
        return [self.scale * seconds for seconds in known]

    def expected(self, rows: Sequence[int]) -> float:
        """Of passes with so many rows; the first has the most."""
        known = self.now(rows[0])
        return sum([known[count] for count in rows])

    def note(self, rows: Sequence[int], reading: float, seconds: float) -> None:
        """Such passes, and `reading` without the factor, took so long."""
        expected = self.expected(rows) / self.scale + reading
        self.scale = _followed(self.scale, seconds / expected)


class _Places(NamedTuple):
    """What was measured around a kind of step."""

    between: list[tuple[int, int]]
    """Numbers of sequences, and places on their curves."""
    around: list[tuple[_Curve, int, float, float]]
    """The same as curves; how much of each one's seconds such a step takes, and how much of a step counts for it."""


class _Curve:
    """Seconds at some places, in proportion between them and past the last, the first's before it."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self.places = sorted(measured)
        self.seconds = [max(measured[place], 1e-9) for place in self.places]
        self.steps = [0.0] * len(self.places)
        """That were at each of them since."""

    @property
    def last(self) -> tuple[int, float]:
        """The place furthest out, and its seconds."""
        return self.places[-1], self.seconds[-1]

    def at(self, place: float) -> float:
        """Seconds at a place."""
        seconds = sum([share * self.seconds[index] for index, share in _around(self.places, place).items()])
        return seconds * max(place / self.places[-1], 1.0)


def _around(places: Sequence[int], place: float) -> dict[int, float]:
    """The indices of those of some ascending places that are around another one, and how much each counts."""
    after = bisect_left(places, place)
    if after == len(places):
        return {after - 1: 1.0}
    if after == 0 or places[after] == place:
        return {after: 1.0}
    share = (place - places[after - 1]) / (places[after] - places[after - 1])
    return {after - 1: 1 - share, after: share}


def _alike(before: int, read: int) -> bool:
    return before <= 2 * read and read <= 2 * before


def _trusted(ratio: float) -> float:
    return _DISTURBED if ratio > 1 else 1.0


def _followed(scale: float, ratio: float) -> float:
    """A longer time counts for as little here as in the table, or the two would drift apart."""
    to = min(max(ratio, scale * _SHORTEST), scale * _LONGEST)
    return scale + _WEIGHT * _trusted(to / scale) * (to - scale)
