"""Seconds by places that were measured, between them and past them, and their corrections."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from divisi.cluster.step_times.following import trusted

_CORRECTION = 0.1
"""Of what an unusual step took beside what was expected of it, in the table; more where few steps have been."""
_MEASURED_STEPS = 2
"""Steps at a place that its measurement counts for."""


class Curve:
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


class Neighbours(NamedTuple):
    """What was measured around a kind of step."""

    between: list[tuple[int, int]]
    """Numbers of sequences, and places on their curves."""
    around: list[tuple[Curve, int, float, float]]
    """The same as curves; how much of each one's seconds such a step takes, and how much of a step counts for it."""

    @property
    def seconds(self) -> float:
        """What such a step takes."""
        return sum([weight * curve.seconds[index] for curve, index, weight, _ in self.around])

    def note(self) -> None:
        """There was a step of this kind."""
        for curve, index, _, share in self.around:
            curve.steps[index] += share

    def correct(self, ratio: float, part: float) -> None:
        """`ratio`: what a step took to what was expected of it, of which so large a part comes from these places. Those
        that few steps were at are to blame first.
        """
        blame = [share / (1 + curve.steps[index]) for curve, index, _, share in self.around]
        for (curve, index, *_), own in zip(self.around, blame, strict=True):
            followed = trusted(ratio) * max(_CORRECTION, 1 / (_MEASURED_STEPS + curve.steps[index]))
            curve.seconds[index] *= 1 + followed * part * own / sum(blame) * (ratio - 1)


class Table:
    """Seconds by decoding sequences and rows of each: a curve for each number of sequences that was measured."""

    def __init__(self, measured: Mapping[int, Mapping[int, float]]) -> None:
        self._curves = {sequences: Curve(by_rows) for sequences, by_rows in sorted(measured.items()) if by_rows}
        self._numbers = [*self._curves]
        self._rows: dict[int, list[float]] = {}
        """By sequences, then by rows past the first of each."""
        self._neighbours: dict[tuple[int, int], Neighbours] = {}
        """By sequences and rows."""

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._numbers)

    @property
    def largest(self) -> tuple[int, float]:
        """Rows and seconds of the largest step that was measured."""
        sequences = self._numbers[-1]
        each, seconds = self._curves[sequences].last
        return sequences * each, seconds

    def rows(self, sequences: int, most: int) -> list[float]:
        """With 0, 1, ... `most` rows, or more, besides one of each sequence; as it was when `renew` was called last."""
        rows = self._rows.get(sequences)
        if rows is None or len(rows) <= most:
            rows = [self._at(sequences, (sequences + more) / sequences) for more in range(most + 1)]
            self._rows[sequences] = rows
        return rows

    def renew(self) -> None:
        """Corrections since then count in `rows`."""
        self._rows.clear()

    def neighbours(self, sequences: int, rows: int) -> Neighbours:
        """Of steps with so many rows."""
        if (found := self._neighbours.get((sequences, rows))) is None:
            found = self._neighbours[sequences, rows] = self._find(sequences, rows / sequences)
        return found

    def _find(self, sequences: int, each: float) -> Neighbours:
        beyond = max(sequences / self._numbers[-1], 1.0)
        between, around = [], []
        for number, share in self._beside(sequences).items():
            curve = self._curves[number]
            further = beyond * max(each / curve.places[-1], 1.0)
            for index, part in _around(curve.places, each).items():
                between.append((number, index))
                around.append((curve, index, share * part * further, share * part))
        return Neighbours(between, around)

    def _at(self, sequences: int, each: float) -> float:
        seconds = sum([share * self._curves[number].at(each) for number, share in self._beside(sequences).items()])
        return seconds * max(sequences / self._numbers[-1], 1.0)

    def _beside(self, sequences: int) -> dict[int, float]:
        """The numbers of sequences that were measured around this one, and how much each counts."""
        return {self._numbers[index]: share for index, share in _around(self._numbers, sequences).items()}


def _around(places: Sequence[int], place: float) -> dict[int, float]:
    """The indices of those of some ascending places that are around another one, and how much each counts."""
    after = bisect_left(places, place)
    if after == len(places):
        return {after - 1: 1.0}
    if after == 0 or places[after] == place:
        return {after: 1.0}
    share = (place - places[after - 1]) / (places[after] - places[after - 1])
    return {after - 1: 1 - share, after: share}
