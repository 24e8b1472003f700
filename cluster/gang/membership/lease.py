"""Whose a gang is: it outlives the process that has made it, but not for long. Plain Python."""

from __future__ import annotations

from collections.abc import Callable


class OwnerLease:
    """Of one owner at a time, the last that took it. From the start there is one period for the first to come."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._owner = ""
        self._until = clock() + lease_s

    def take(self, owner: str) -> None:
        """Become the owner in the place of whoever was."""
        self._owner = owner
        self._until = self._clock() + self._lease_s

    def keep(self, owner: str) -> bool:
        """Be it for one more period; False where another has taken it. Without an owner whoever asks is it."""
        if self._owner not in ("", owner):
            return False
        self.take(owner)
        return True

    @property
    def lapsed(self) -> bool:
        """Whether the owner is gone, and nobody has come in its place."""
        return self._clock() >= self._until
