"""What a step consists of: passes, each one walk over some layers by all ranks. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class PassKind(enum.IntEnum):
    """Which layers a pass walks over."""

    DRAFT = 0
    FULL = 1


@dataclass(frozen=True, slots=True)
class Pass:
    """One walk over the layers of its kind, with the rows that each worker brings to it."""

    kind: PassKind
    counts: Mapping[int, int]
    """Rows by attention seat; a seat without rows may be left out."""
    second: Mapping[int, int] = field(default_factory=dict)
    """How many of them, the last ones, make up a second micro-batch: it is with the experts while the first is not."""
    bucket: int = 0
    """Rows that each worker's batch is padded to; 0: none. Room for what pads; unused."""

    def rows(self, seat: int) -> int:
        """Rows of `attention:seat`."""
        return self.counts.get(seat, 0)

    @property
    def micro_batches(self) -> tuple[Pass, ...]:
        """One or two, each as a pass by itself; their rows go through a layer one micro-batch after the other."""
        if not self.second:
            return (self,)
        first = {seat: left for seat, rows in self.counts.items() if (left := rows - self.second.get(seat, 0))}
        return Pass(self.kind, first), Pass(self.kind, self.second)


@dataclass(frozen=True, slots=True)
class PassLayers:
    """The layers with routed experts that a pass of each kind walks over, in order."""

    full: Sequence[int]
    draft: Sequence[int] = ()

    def of(self, kind: PassKind) -> Sequence[int]:
        """The layers of one kind."""
        return self.full if kind is PassKind.FULL else self.draft


def plain_elsewhere(passes: Sequence[Pass], worker: int) -> int:
    """Sequences without drafts that others than `attention:worker` bring to a step; rows of prefills count as such."""
    *drafts, full = passes
    rows = sum(full.counts.values()) - full.rows(worker)
    drafted = sum(sum(step_pass.counts.values()) - step_pass.rows(worker) for step_pass in drafts)
    drafting = sum(drafts[0].counts.values()) - drafts[0].rows(worker) if drafts else 0
    return rows - drafted - drafting
