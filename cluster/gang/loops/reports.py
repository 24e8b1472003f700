"""What a lockstep loop tells the coordinator. Imports no torch."""

from __future__ import annotations

import logging
from typing import Protocol

from divisi.cluster.errors import EpochEnded, StepAborted


def level_of(error: StepAborted) -> int:
    """How the log tells that a loop has left an epoch."""
    return logging.INFO if isinstance(error, EpochEnded) else logging.WARNING


class EpochReports(Protocol):
    """Reports of a loop; neither call raises."""

    def serving(self, epoch: int) -> None:
        """All peers of the epoch were reached."""
        ...

    def left(self, epoch: int, reason: str, suspect: str | None = None) -> None:
        """The loop is out of the epoch and touches nothing of it any more; `suspect`: the seats that it blames."""
        ...
