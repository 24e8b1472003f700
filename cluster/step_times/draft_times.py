"""What the draft passes of a step take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from divisi.cluster.step_times.following import alike, corrected_reading, followed, limited
from divisi.cluster.step_times.measured import Measured
from divisi.cluster.step_times.table import Curve


class PassTimes:
    """Seconds of one kind of draft pass by its rows, and a factor on them."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        self._curve = Curve(measured)
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
        self.scale = followed(self.scale, seconds / expected)


class DraftTimes:
    """Those of a step's first draft pass and of each further one, and what reading costs in both."""

    def __init__(self, measured: Measured) -> None:
        self.first = PassTimes(measured.first or measured.draft)
        self.further = PassTimes(measured.draft)
        self._reading = measured.reading.draft
        """Without the factors."""
        self._before: int | None = None
        """Tokens that the last step's drafts read."""

    @property
    def reading(self) -> float:
        """What reading a token costs now, in each pass after the first."""
        return self._reading * self.further.scale

    def note(self, rows: Sequence[int], read: int, seconds: Sequence[float]) -> None:
        """See StepTimes."""
        (first, *further), each = rows, self._reading * read / sum(rows)
        self.first.note([first], each * first, seconds[0])
        if not further:
            return
        reading, spent = each * sum(further), sum(seconds[1:])
        before, self._before = self._before, read
        if before is None or alike(before, read):
            self.further.note(further, reading, spent)
        else:
            scaled = self.further.scale * reading
            expected = self.further.expected(further) + scaled
            self._reading = corrected_reading(self._reading, limited(spent / expected), scaled / expected)
