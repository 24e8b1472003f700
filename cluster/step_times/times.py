"""All that is known of what steps take."""

from __future__ import annotations

from collections.abc import Sequence

from divisi.cluster.step_times.draft_times import DraftTimes
from divisi.cluster.step_times.following import alike
from divisi.cluster.step_times.full_times import FullTimes
from divisi.cluster.step_times.measured import Measured, Reading

_ALIKE_EVERY = 4
"""Of steps that are like the one before, so many are noted once: noting takes a small model's layer's time."""


class StepTimes:
    """The table, a factor on each part of it, and what follows from both.

    A step like the one before it that takes longer than expected says that the machine has become slower: the factor
    follows. One of other size than that before it, or with far more or less to read, says that the table is wrong
    there: the table does, and what reading costs, each as much as it is of what was expected.
    """

    def __init__(self, measured: Measured | None = None) -> None:
        self._full = FullTimes()
        self._due = _Due()
        self.learn(measured or Measured())

    @property
    def reading(self) -> Reading:
        """As it is now."""
        first, more = self._full.reading
        return Reading(first, more, self._drafts.reading)

    def learn(self, measured: Measured) -> None:
        """Take over a table; empty: nothing is known."""
        self.measured = measured
        self._full.learn(measured)
        self._drafts = DraftTimes(measured)
        self.is_known = self._full.is_known and self._drafts.further.is_known
        """Whether anything has been measured."""

    def full(self, sequences: int, most: int) -> list[float]:
        """Seconds of all but drafts with 0, 1, ... `most` rows, or more, besides one of each sequence."""
        return self._full.now(sequences, most)

    def draft(self, most: int) -> list[float]:
        """Seconds of a draft pass after a step's first with 0, 1, ... `most` rows, or more."""
        return self._drafts.further.now(most)

    def first_draft(self, most: int) -> list[float]:
        """The same of a step's first one, with all that precedes it."""
        return self._drafts.first.now(most)

    def prefill(self, rows: int) -> float:
        """What rows of prefills add to a step, about: each as much as in the largest that was measured."""
        return self._full.prefill(rows)

    def is_due(self, sequences: int, rows: int, read_first: int) -> bool:
        """Whether a step that was like this is to be noted."""
        return self._due.asks_for(sequences, rows, read_first)

    def note_full(self, sequences: int, rows: int, read_first: int, read_more: int, seconds: float) -> None:
        """All but the drafts of a step took so long: what others cost on the way shows here.

        `read_first`, `read_more`: tokens before the first row of each sequence, and before all others.
        """
        if self.is_known:
            self._full.note(sequences, rows, read_first, read_more, seconds)

    def note_drafts(self, rows: Sequence[int], read: int, seconds: Sequence[float]) -> None:
        """The draft passes of a step took so long; `rows` of each, the first has the most; `read`: tokens before all
        rows of all passes.
        """
        if self.is_known and rows:
            self._drafts.note(rows, read, seconds)


class _Due:
    """Which steps are noted."""

    def __init__(self) -> None:
        self._sequences = self._rows = self._read = 0
        """Of the last step that was due."""
        self._alike = 0
        """Steps like it since."""

    def asks_for(self, sequences: int, rows: int, read_first: int) -> bool:
        same = sequences == self._sequences and rows == self._rows and alike(self._read, read_first)
        if same and self._alike < _ALIKE_EVERY - 1:
            self._alike += 1
            return False
        self._sequences, self._rows, self._read, self._alike = sequences, rows, read_first, 0
        return True
