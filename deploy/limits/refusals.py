"""What was refused for want of room, while it may be expected to come again."""

from __future__ import annotations

from collections.abc import Callable


class Refusals:
    """Tokens of refused requests, each for as long as its client was told to stay away: one that obeys counts once."""

    def __init__(self, clock: Callable[[], float], grain_s: float = 0.25) -> None:
        """Times are rounded up to grains, so that the memory is bounded by the longest of them, whatever the rate."""
        self._clock = clock
        self._grain_s = grain_s
        self._until: dict[int, int] = {}

    def add(self, tokens: int, wait_s: float) -> None:
        """A request was refused, and told to come again after `wait_s`."""
        grain = int((self._clock() + wait_s) / self._grain_s) + 1
        self._until[grain] = self._until.get(grain, 0) + tokens

    def tokens(self) -> int:
        """What has not come again yet, though it may."""
        now = self._clock() / self._grain_s
        self._until = {grain: tokens for grain, tokens in self._until.items() if grain > now}
        return sum(self._until.values())
