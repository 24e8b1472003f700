"""A token bucket that may go into debt: a request is charged what it turns out to use."""

from __future__ import annotations

from collections.abc import Callable


class TokenBucket:
    """Holds a minute's tokens at most, and is refilled evenly."""

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._capacity = per_minute
        self._per_second = per_minute / 60.0
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    @property
    def level(self) -> float:
        """Tokens left; below zero is debt."""
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self._per_second, self._capacity)
        self._at = now
        return self._level

    def charge(self, tokens: int) -> None:
        """Take tokens, also those that aren't there."""
        self._level = self.level - tokens

    def wait_s(self) -> float:
        """Seconds until there is a token again; 0 while there is one."""
        enough = min(1.0, self._capacity)  # of less than a token a minute there never is a whole one
        return max(0.0, (enough - self.level) / self._per_second)
