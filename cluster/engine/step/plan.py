"""What passes between the scheduler and the engine: a step's plan, and what became of it.

A step's rows are laid out here, once: those of the ring runs first, then those of the scan runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from divisi.cluster.engine.memory.sequence_memory import NOTHING, PageGrowth
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

    A ring run decodes: its first row is that of the sequence's last token, those of drafts follow. A scan run prefills,
    also where it is one row long.
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
    """Whether its last row of logits chooses the sequence's next token; of a ring run every row chooses one."""
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
    def num_drafts(self) -> int:
        """Tokens that are drafted for it."""
        return self.num_rows - 1 if self.kind is RunKind.RING else 0

    @property
    def chosen_positions(self) -> range:
        """Where the tokens stand that it chooses, if it chooses any."""
        return range(self.end - self.num_drafts, self.end + 1)

    @property
    def choosing_rows(self) -> range:
        """The rows of logits that choose tokens, if it chooses any."""
        end = self.logit_row + len(self.logit_positions)
        return range(end - 1 - self.num_drafts, end)


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
class Cuts:
    """Which steps are cut into two micro-batches; never those that prefill, whose few runs do not fall into halves."""

    rows: range = range(0)
    """So many rows."""
    crowded: bool = False
    """Also where ranks share cores, so that none can compute while another one does."""

    def where(self, *, crowded: bool) -> Cuts:
        """Those that are left where ranks do or do not share cores."""
        return NEVER if crowded and not self.crowded else self

    def second(self, rings: Seq[Run], num_rows: int) -> int:
        """Rows of the second micro-batch: of the runs from the middle on; 0: there is none."""
        if num_rows not in self.rows:
            return 0
        first = next((run.row for run in rings if 2 * run.row >= num_rows), 0)
        return num_rows - first if first else 0


NEVER, ALWAYS = Cuts(), Cuts(range(2, sys.maxsize), crowded=True)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Its sequences do not change until it is committed."""

    rings: tuple[Run, ...]
    scans: tuple[Run, ...]
    num_rows: int
    drafting: tuple[Run, ...] = ()
    """The ring runs with drafts, those with the most first: a draft pass has a row of each that drafts so far."""
    growths: tuple[PageGrowth, ...] = ()
    ops: MemoryOps = NO_OPS
    alone: bool = False
    """It is to have a step of the gang for itself."""
    second: int = 0
    """Rows of the full pass's second micro-batch, its last ones; 0: it has one."""
    counts: tuple[int, ...] = field(init=False)
    """Rows by pass: of the draft passes, then of the one over all layers."""
    choosing: tuple[Run, ...] = field(init=False)
    """The runs that choose tokens, in the order of their rows."""

    def __post_init__(self) -> None:
        scans = tuple([run for run in self.scans if run.chooses]) if self.scans else ()
        object.__setattr__(self, "choosing", self.rings + scans)
        most = self.drafting[0].num_drafts if self.drafting else 0
        drafts = [sum([run.num_drafts > ahead for run in self.drafting]) for ahead in range(most)]
        object.__setattr__(self, "counts", (*drafts, self.num_rows))

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs in the order of their rows."""
        return self.rings + self.scans

    @property
    def cut(self) -> tuple[int, int]:
        """Where the second micro-batch begins: its first run and row."""
        row = self.num_rows - self.second
        return next(index for index, run in enumerate(self.rings) if run.row == row), row


class PlanLayout:
    """What a step is to compute, collected while it is planned; `plan` lays out its rows."""

    def __init__(self, max_rows: int, max_prompt_logits: int) -> None:
        self.rows_left = max_rows
        self.prompt_logits_left = max_prompt_logits
        self._rings: dict[Sequence, int] = {}
        """How many tokens each is to draft."""
        self._scans: list[tuple[Sequence, int]] = []

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that decode, in the order of their rows."""
        return [*self._rings]

    @property
    def num_sequences(self) -> int:
        """That take part in the step."""
        return len(self._rings) + len(self._scans)

    def add_ring(self, sequence: Sequence) -> None:
        """One row, at the committed length."""
        self._rings[sequence] = 0
        self.rows_left -= 1

    def add_drafts(self, sequence: Sequence, count: int) -> None:
        """More rows for a sequence that decodes, for tokens to be drafted."""
        self._rings[sequence] += count
        self.rows_left -= count

    def add_scan(self, sequence: Sequence, end: int) -> None:
        """Rows from the committed length to `end`; leaves the state at `end` in the first of the spares."""
        self._scans.append((sequence, end))
        self.rows_left -= end - sequence.length
        self.prompt_logits_left -= len(sequence.prompt_positions(sequence.length, end))

    def plan(
        self, growths: tuple[PageGrowth, ...], ops: MemoryOps, cuts: Cuts = NEVER, *, alone: bool = False
    ) -> StepPlan:
        """The plan: ring runs first, then scan runs."""
        rings, scans, row, logit_row = [], [], 0, 0
        for sequence, drafts in self._rings.items():
            rings.append(_ring(sequence, drafts, row))
            row += 1 + drafts
        logit_row = row  # all rows of ring runs choose
        for sequence, end in self._scans:
            run = _scan(sequence, end, row, logit_row)
            scans.append(run)
            row += run.num_rows
            logit_row += len(run.logit_positions)
        drafting = sorted((run for run in rings if run.num_rows > 1), key=lambda run: -run.num_rows)
        second = 0 if scans else cuts.second(rings, row)
        return StepPlan(tuple(rings), tuple(scans), row, tuple(drafting), growths, ops, alone, second)


def _ring(sequence: Sequence, drafts: int, row: int) -> Run:
    start, end = sequence.length, sequence.length + 1 + drafts
    return Run(sequence, RunKind.RING, start, end, row, range(start, end), row, True, sequence.holding.slot)


def _scan(sequence: Sequence, end: int, row: int, logit_row: int) -> Run:
    start, holding = sequence.length, sequence.holding
    completes = end == len(sequence.tokens)
    chooses = completes and end < sequence.max_length
    prompt = sequence.prompt_positions(start, end)
    return Run(
        sequence,
        RunKind.SCAN,
        start,
        end,
        row,
        (*prompt, end - 1) if chooses else prompt,
        logit_row,
        chooses,
        holding.source if start else NOTHING,
        (Leave(end, holding.spares[0]),),
        completes,
    )


class Outcome(NamedTuple):
    """What a step, or a cancellation, did to a sequence."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    finish_reason: EndReason | None = None
    stop_id: int | None = None
