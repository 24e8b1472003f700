"""What all but the drafts of a step takes."""

from __future__ import annotations

from divisi.cluster.step_times.following import alike, corrected_reading, followed, limited
from divisi.cluster.step_times.measured import Measured
from divisi.cluster.step_times.table import Neighbours, Table

_ANEW_EVERY = 16
"""Steps after which corrections count: until then lists of times are kept."""


class FullTimes:
    """A table, what reading costs, and a factor on both, which outlasts the table."""

    def __init__(self) -> None:
        self._table = Table({})
        self._first = self._more = 0.0
        """What reading costs, without the factor."""
        self._scale = 1.0
        self._before: tuple[Neighbours, int] | None = None
        """Of the last step, and the tokens before the first rows of its sequences."""
        self._noted = 0

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self._table.is_known

    @property
    def reading(self) -> tuple[float, float]:
        """What reading a token costs now: the first row of a sequence, and each further one."""
        return self._first * self._scale, self._more * self._scale

    def learn(self, measured: Measured) -> None:
        """Take over a table."""
        self._table, self._before = Table(measured.full), None
        self._first, self._more, _ = measured.reading

    def now(self, sequences: int, most: int) -> list[float]:
        """With 0, 1, ... `most` rows, or more, besides one of each sequence."""
        scale = self._scale
        return [scale * seconds for seconds in self._table.rows(sequences, most)]

    def prefill(self, rows: int) -> float:
        """What rows of prefills add, about: each as much as in the largest step that was measured."""
        most, seconds = self._table.largest
        return self._scale * rows * seconds / most

    def note(self, sequences: int, rows: int, read_first: int, read_more: int, seconds: float) -> None:
        """See StepTimes."""
        places = self._table.neighbours(sequences, rows)
        first, more = self._first * read_first, self._more * read_more
        reading = first + more
        expected = places.seconds + reading
        before, self._before = self._before, (places, read_first)
        if before is None or (before[0].between == places.between and alike(before[1], read_first)):
            self._scale = followed(self._scale, seconds / expected)
        else:
            ratio = limited(seconds / (self._scale * expected))
            places.correct(ratio, 1 - reading / expected)
            self._first = corrected_reading(self._first, ratio, first / expected)
            self._more = corrected_reading(self._more, ratio, more / expected)
        places.note()
        self._noted += 1
        if self._noted % _ANEW_EVERY == 0:
            self._table.renew()
