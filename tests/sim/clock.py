"""A virtual clock: actions at times, carried out in order of time when somebody lets it pass."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class VirtualClock:
    """Time passes only by `pass_time` and `skip_to_next`, so a trace depends on nothing but its seed."""

    def __init__(self) -> None:
        self.now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing will happen any more."""
        return not self._agenda

    def at(self, time: float, action: Callable[[], None]) -> None:
        """Have something done at a time; what is due at the same time is done in the order of these calls."""
        heapq.heappush(self._agenda, (time, self._count, action))
        self._count += 1

    def pass_time(self, seconds: float) -> None:
        """Let time pass and do all that is due."""
        self._advance(self.now + seconds)

    def skip_to_next(self) -> None:
        """Let time pass until something is due, and do it."""
        self._advance(self._agenda[0][0])

    def _advance(self, until: float) -> None:
        while self._agenda and self._agenda[0][0] <= until:
            time, _, action = heapq.heappop(self._agenda)
            self.now = max(self.now, time)
            action()
        self.now = max(self.now, until)
