"""How fast work is finished, measured over a sliding window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class DrainRate:
    """Tokens finished per second in the last `window_s` seconds of work, prompt and generated alike."""

    def __init__(self, clock: Callable[[], float], window_s: float = 10.0, grain_s: float = 0.25) -> None:
        """Counts are kept in grains, so that the memory is bounded whatever the rate."""
        self._clock = clock
        self._window_s = window_s
        self._grain_s = grain_s
        self._grains: deque[tuple[float, int]] = deque()
        self._busy_since = clock()
        self._former: float | None = None

    def start(self) -> None:
        """There is work from now on: the pause before it must not count as slowness."""
        self._busy_since = self._clock()
        self._grains.clear()

    def pause(self) -> None:
        """There is no more work."""
        self._former = self.per_second()

    def add(self, tokens: int) -> None:
        """So many tokens have been finished."""
        now = self._clock()
        if self._grains and now - self._grains[-1][0] < self._grain_s:
            at, count = self._grains[-1]
            self._grains[-1] = (at, count + tokens)
        else:
            self._grains.append((now, tokens))

    def per_second(self) -> float | None:
        """The rate of this busy spell, or of the one before while this one has nothing to show; None: never any."""
        now = self._clock()
        while self._grains and now - self._grains[0][0] > self._window_s:
            self._grains.popleft()
        lasted = min(now - self._busy_since, self._window_s)
        tokens = sum(count for _, count in self._grains)
        if tokens == 0 or lasted <= 0 or (lasted < self._grain_s and self._former is not None):
            return self._former
        return tokens / lasted
