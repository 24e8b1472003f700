"""What a step consists of: passes, each one walk over some layers by all ranks. Imports no torch."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


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
    bucket: int = 0
    """Rows that each worker's batch is padded to; 0: none. Room for what pads; unused."""
    micro_batches: int = 1
    """Slices that the pass is cut into. Room for what overlaps them; unused."""

    def rows(self, seat: int) -> int:
        """Rows of `attention:seat`."""
        return self.counts.get(seat, 0)


@dataclass(frozen=True, slots=True)
class PassLayers:
    """The layers with routed experts that a pass of each kind walks over, in order."""

    full: Sequence[int]
    draft: Sequence[int] = ()

    def of(self, kind: PassKind) -> Sequence[int]:
        """The layers of one kind."""
        return self.full if kind is PassKind.FULL else self.draft
