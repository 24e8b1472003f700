"""How many expert shards there are to be, by the share of their time in steps that attention workers wait for experts.

Each window of measured time votes for a number. What was voted for in all of a delay is done: a burst starts no shard,
a lull ends none. With E - 1 shards experts are taken to need E / (E - 1) times as long, and fewer there are only where
that keeps the share well below the mark above which there would be more again; what does not go by their number, such
as the wire or the busiest expert, makes fewer cheaper than that, so that constant load never has a shard come that has
just gone. Windows with hardly any steps want no more, whatever their share. Plain data, no clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LIGHT = 0.1
"""Of the time the busiest worker is in steps for less than this: more shards would be of little use to anybody."""
_SAFELY = 0.9
"""Of a mark: what is expected with fewer shards is to stay below so much of it."""


@dataclass(frozen=True, slots=True)
class WaitRule:
    """The settings of it; see `ExpertAutoscalingSettings`."""

    least: int
    most: int
    high: float
    low: float
    upscale_delay_s: float
    downscale_delay_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """What attention workers have measured for a while."""

    seconds: float
    step_s: float = 0.0
    """In steps, of the one that waited for experts for the least of them."""
    wait_s: float = 0.0
    """Of that, waiting for experts."""
    busiest_s: float = 0.0
    """In steps, of the busiest."""

    @property
    def share(self) -> float:
        """Of the time in steps that for experts; 0 where there were no steps."""
        return self.wait_s / self.step_s if self.step_s else 0.0

    @property
    def busy(self) -> float:
        """Of all time that in steps, of the busiest."""
        return self.busiest_s / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Vote:
    """For so many shards, by a window."""

    window: Window
    shards: int


def expected_share(share: float, shards: int, other: int) -> float:
    """The share with another number of shards, where experts' time goes by their number and nothing else does."""
    wait = share * shards / other
    return wait / (wait + 1 - share) if wait else 0.0


def wanted(window: Window, shards: int, rule: WaitRule) -> int:
    """The shards that a window with so many of them votes for: one more, one less, as many, or, idle, the least."""
    if not window.step_s:
        return rule.least
    light = window.busy < LIGHT
    if not light and window.share > rule.high:
        return min(shards + 1, rule.most)
    return shards - 1 if shards > rule.least and _can_do_with_fewer(window, shards, rule, light) else shards


def _can_do_with_fewer(window: Window, shards: int, rule: WaitRule, light: bool) -> bool:
    if light:  # and is to be then
        length = 1 + window.share / (shards - 1)
        return window.busy * length < _SAFELY * LIGHT
    return window.share < rule.low and expected_share(window.share, shards, shards - 1) < _SAFELY * rule.high


def decide(votes: Sequence[Vote], shards: int, rule: WaitRule) -> tuple[int, Window]:
    """How many there are to be, and what was measured meanwhile; `votes` are those since there are `shards`."""
    more = last(votes, rule.upscale_delay_s)
    if more and (least := min(vote.shards for vote in more)) > shards:
        return least, together(more)
    fewer = last(votes, rule.downscale_delay_s)
    if fewer and (most := max(vote.shards for vote in fewer)) < shards:
        return most, together(fewer)
    return shards, Window(0.0)


def last(votes: Sequence[Vote], seconds: float) -> Sequence[Vote]:
    """The latest votes, that cover so much measured time; none where there are not as many."""
    covered = 0.0
    for place in range(len(votes) - 1, -1, -1):
        covered += votes[place].window.seconds
        if covered >= seconds:
            return votes[place:]
    return ()


def together(votes: Sequence[Vote]) -> Window:
    """All that was measured."""
    windows = [vote.window for vote in votes]
    return Window(
        sum(window.seconds for window in windows),
        sum(window.step_s for window in windows),
        sum(window.wait_s for window in windows),
        sum(window.busiest_s for window in windows),
    )
