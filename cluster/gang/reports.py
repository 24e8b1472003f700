"""What a lockstep loop tells the coordinator. Imports no torch."""

from __future__ import annotations

from typing import Protocol


class EpochReports(Protocol):
    """Reports of a loop; neither call raises."""

    def serving(self, epoch: int) -> None:
        """All peers of the epoch were reached."""
        ...

    def left(self, epoch: int, reason: str) -> None:
        """The loop is out of the epoch and touches nothing of it any more."""
        ...
