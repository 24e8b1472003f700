"""What passes between the scheduler and the engine: a step's plan, and what became of it.

A step's rows are laid out here, once: those of the ring runs first, then those of the scan runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from divisi.cluster.engine.memory import NOTHING, PageGrowth
from divisi.cluster.engine.sequence import Sequence
from divisi.cluster.request import EndReason


class RunKind(Enum):
    """How a run treats recurrent state."""

    RING = "ring"
    """A few rows that go on from the sequence's own slot, which is replayed up to `start`; they go to its ring."""
    SCAN = "scan"
    """Any number of rows from a slot that stands at `start`, or from nothing. The slot is left as it is."""


class Leave(NamedTuple):
    """A state that a scan run leaves: of the first `position` tokens, in `slot`."""

    position: int
    slot: int


class Run(NamedTuple):
    """Tokens `start:end` of one sequence in a step.

    A ring run decodes; a scan run prefills, also where it is one row long.
    """

    sequence: Sequence
    kind: RunKind
    start: int
    end: int
    row: int
    """Where its rows begin in the step."""
    logit_positions: range | tuple[int, ...]
    """The positions whose logits are wanted, ascending: for prompt log-probabilities, then for the next token."""
    logit_row: int
    """Where these begin among the step's rows of logits."""
    chooses: bool
    """Whether its last row of logits chooses the sequence's next token."""
    source: int = NOTHING
    """The slot that it reads."""
    leaves: tuple[Leave, ...] = ()
    """Of a scan run, ascending; the last is the state at `end`."""
    completes: bool = True
    """Whether the sequence has no token left to compute after it."""

    @property
    def num_rows(self) -> int:
        """Rows that it takes in the step."""
        return self.end - self.start

    @property
    def prompt_positions(self) -> range | tuple[int, ...]:
        """Those of `logit_positions` that tell the prompt's log-probabilities."""
        return self.logit_positions[:-1] if self.chooses else self.logit_positions

    @property
    def chosen_row(self) -> int:
        """The row of logits that chooses the next token."""
        return self.logit_row + len(self.logit_positions) - 1


class MemoryOps(NamedTuple):
    """What happens to memory before a step's first pass. Done again with the step when it is replayed, to no effect."""

    flushes: tuple[tuple[int, int], ...] = ()
    """(slot, position): replay the slot's ring up to there."""
    slot_copies: tuple[tuple[int, int], ...] = ()
    """(from, to)."""
    page_copies: tuple[tuple[int, int], ...] = ()
    """(from, to)."""


NO_OPS = MemoryOps()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Its sequences do not change until it is committed."""

    rings: tuple[Run, ...]
    scans: tuple[Run, ...]
    num_rows: int
    growths: tuple[PageGrowth, ...] = ()
    ops: MemoryOps = NO_OPS

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs in the order of their rows."""
        return self.rings + self.scans

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows by pass. There is one, over all layers."""
        return (self.num_rows,)

    @property
    def choosing(self) -> list[Run]:
        """The runs that choose tokens, in the order of their rows."""
        return [*self.rings, *(run for run in self.scans if run.chooses)]


class PlanLayout:
    """Lays out the rows of a step while it is planned: ring runs have to be added before scan runs."""

    def __init__(self, max_rows: int, max_prompt_logits: int) -> None:
        self.rows_left = max_rows
        self.prompt_logits_left = max_prompt_logits
        self._rings: list[Run] = []
        self._scans: list[Run] = []
        self._rows = self._logit_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows laid out so far."""
        return self._rows

    def add_ring(self, sequence: Sequence, end: int) -> None:
        """Rows from the committed length to `end`, all of which choose a token."""
        assert not self._scans, "ring runs come first"
        start = sequence.length
        run = Run(sequence, RunKind.RING, start, end, self._rows, range(start, end), self._logit_rows, True,
                  sequence.holding.slot)  # fmt: skip
        self._rings.append(run)
        self._take(run)

    def add_scan(self, sequence: Sequence, end: int) -> None:
        """Rows from the committed length to `end`; leaves the state at `end` in the first of the spares."""
        start, holding = sequence.length, sequence.holding
        completes = end == len(sequence.tokens)
        chooses = completes and end < sequence.max_length
        prompt = sequence.prompt_positions(start, end)
        run = Run(
            sequence,
            RunKind.SCAN,
            start,
            end,
            self._rows,
            (*prompt, end - 1) if chooses else prompt,
            self._logit_rows,
            chooses,
            holding.source if start else NOTHING,
            (Leave(end, holding.spares[0]),),
            completes,
        )
        self._scans.append(run)
        self._take(run)
        self.prompt_logits_left -= len(prompt)

    def plan(self, growths: tuple[PageGrowth, ...], ops: MemoryOps) -> StepPlan:
        """The plan as it was laid out."""
        return StepPlan(tuple(self._rings), tuple(self._scans), self._rows, growths, ops)

    def _take(self, run: Run) -> None:
        self._rows += run.num_rows
        self._logit_rows += len(run.logit_positions)
        self.rows_left -= run.num_rows


class Outcome(NamedTuple):
    """What a step, or a cancellation, did to a sequence."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_id: int | None = None
