"""Which kinds of step are measured, and the table that their times make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from divisi.cluster.engine.memory.sequence_memory import pages_for
from divisi.cluster.engine.scheduler import SchedulerConfig
from divisi.cluster.step_times.measured import Measured, Reading

_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DRAFTS = (0, 1, 2, 3, 5, 8)
STEPS = 5
"""Of each kind, each time that it has its turn."""
_FEW, _MORE_STEPS = 4, 20
"""Sequences whose steps may be so short that more of them are taken: the first ones after a prefill are slower."""
_SPARE_STEPS = 3
"""In which sequences may be admitted one after the other."""
_LONG = 1024
"""Tokens of the prompts that show what reading them costs."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of step."""

    sequences: int
    drafts: int
    prompt: int = 1
    """Tokens of each prompt."""

    @property
    def rows(self) -> int:
        """Of the full pass."""
        return self.sequences * (1 + self.drafts)

    @property
    def most_steps(self) -> int:
        """Each time that it has its turn, however short they are."""
        return _MORE_STEPS if self.sequences <= _FEW else STEPS

    @property
    def answer(self) -> int:
        """Tokens that each sequence may generate."""
        return 1 + (self.most_steps + _SPARE_STEPS) * (1 + self.drafts)

    def fits(self, config: SchedulerConfig) -> bool:
        """Whether all its sequences have room at once."""
        pages = pages_for(self.prompt + self.answer, config.page_size)
        return (
            self.rows <= config.max_step_tokens
            and self.prompt + self.answer < config.max_model_len
            and self.sequences * (pages + 1) <= config.num_pages
            and self.sequences < config.num_slots
        )


def cells(config: SchedulerConfig) -> Iterator[Cell]:
    """The kinds of step that are measured: two with a long prompt, after all others that have as many sequences."""
    numbers = sorted({*(count for count in _SEQUENCES if count < config.max_seqs), config.max_seqs})
    depths = sorted({*(count for count in _DRAFTS if count < config.max_draft_tokens), config.max_draft_tokens})
    for sequences in numbers:
        yield from (cell for drafts in depths if (cell := Cell(sequences, drafts)).fits(config))
        if sequences == 1:
            long = min(_LONG, config.max_model_len // 2)
            yield from (cell for drafts in (0, depths[-1]) if (cell := Cell(1, drafts, long)).fits(config))


class Samples:
    """Times of steps by their cell."""

    def __init__(self) -> None:
        self._full: dict[Cell, list[float]] = defaultdict(list)
        self._draft: dict[Cell, list[float]] = defaultdict(list)
        self._first: dict[Cell, list[float]] = defaultdict(list)
        """Of a step's first draft pass."""

    def add(self, cell: Cell, full: float, draft: Sequence[float]) -> None:
        """Seconds of one step: all but its drafts, and each draft pass."""
        self._full[cell].append(full)
        self._first[cell] += draft[:1]
        self._draft[cell] += draft[1:]

    def count(self, cell: Cell) -> int:
        """Steps of a kind so far."""
        return len(self._full[cell])

    def measured(self) -> Measured:
        """The table, of the shortest times: whatever else a machine does, steps don't become shorter by it.

        What takes longer than a step of as many sequences and rows, or more, was disturbed each time.
        """
        found = {
            (cell.sequences, 1 + cell.drafts): min(seconds)
            for cell, seconds in self._full.items()
            if cell.prompt == 1 and seconds
        }
        full: dict[int, dict[int, float]] = defaultdict(dict)
        for sequences, rows in found:
            larger = [seconds for (most, each), seconds in found.items() if most >= sequences and each >= rows]
            full[sequences][rows] = min(larger)
        first, further = _by_sequences(self._first), _by_sequences(self._draft)
        return Measured(dict(full), further or first, self._reading(), first)

    def _reading(self) -> Reading:
        """By what the same steps take longer after a long prompt, for each of its tokens."""
        longer = {cell.drafts: cell for cell in self._full if cell.prompt > 1}
        if len(longer) < 2:
            return Reading()
        without, deepest = longer[min(longer)], longer[max(longer)]
        first = self._slower(self._full, without)
        both, drafts = self._slower(self._full, deepest), deepest.drafts
        # A row that shares the reading of another takes no longer than if it were alone, and one layer no longer than
        # all; noise may say so.
        more = min(max(both - first, 0.0) / drafts, both / (1 + drafts))
        alone = both - drafts * more
        passes = self._draft if drafts > 1 else self._first
        return Reading(alone, more, min(self._slower(passes, deepest), alone))

    @staticmethod
    def _slower(times: Mapping[Cell, Sequence[float]], cell: Cell) -> float:
        short = Cell(cell.sequences, cell.drafts)
        if not times.get(cell) or not times.get(short):
            return 0.0
        longer = min(times[cell]) - min(times[short])
        return max(longer, 0.0) / (cell.prompt - short.prompt)


def _by_sequences(times: Mapping[Cell, Sequence[float]]) -> dict[int, float]:
    """The shortest times of those with short prompts."""
    found: dict[int, float] = {}
    for cell, seconds in times.items():
        if cell.prompt == 1 and seconds:
            found[cell.sequences] = min(found.get(cell.sequences, inf), *seconds)
    return {sequences: min(found[more] for more in found if more >= sequences) for sequences in found}
