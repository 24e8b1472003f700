"""Follows the policy of `wait_policy`: one change of the number of expert shards at a time, and none that does not help
soon again.

What is measured while a change, a move or a recovery is under way counts for nothing. A shard more that lowers the
share of waiting by less than a quarter of what was to be expected is followed by no other for a while, twice as long
each time. More that are not there in time are given up, with the same rest, whoever has asked for them: nothing could
be voted for meanwhile. Plain data, no clock; all times are in seconds of one clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from divisi.cluster.gang.membership.layout.step_waits import StepWaits
from divisi.cluster.gang.membership.layout.wait_policy import (
    Vote,
    WaitRule,
    Window,
    decide,
    expected_share,
    last,
    together,
    wanted,
)
from divisi.cluster.gang.membership.status import Stats

THERE_WITHIN_S = 900.0
"""A cluster may have to start a node first, and that to fetch an image."""
HELPS = 0.25
"""Of the expected change of the share."""
REST_S, LONGEST_REST_S = 60.0, 3600.0


@dataclass(frozen=True, slots=True)
class Change:
    """Another number of shards, and why, for people."""

    shards: int
    why: str


@dataclass(frozen=True, slots=True)
class Now:
    """Where a gang is."""

    served: int
    """Expert shards of an epoch where everybody is there."""
    wanted: int
    workers: Collection[str]
    """Attention workers in the epoch."""
    settled: bool
    """An epoch serves, and nothing is under way."""


@dataclass(frozen=True, slots=True)
class _Asked:
    shards: int
    since: float
    before: int
    share: float | None
    """With those from before; None: somebody else has asked, or a former coordinator, and nothing is to be judged."""


class ExpertAutoscaling:
    """Of one gang. Measures without a rule, too."""

    def __init__(self, rule: WaitRule | None) -> None:
        """None: there are as many as somebody asks for."""
        self.rule = rule
        self.share = 0.0
        """In the last window."""
        self._waits = StepWaits()
        self._votes: list[Vote] = []
        self._shards = 0
        """Which the votes are about."""
        self._asked: _Asked | None = None
        """Under way."""
        self._came: _Asked | None = None
        """Has brought more shards, of which it is still to be seen whether they help."""
        self._rest_s, self._rest_until = REST_S, 0.0

    def check(self, shards: int) -> None:
        """Raise ValueError, for people, where somebody asks for a number that the policy would never have."""
        rule = self.rule
        if rule is not None and not rule.least <= shards <= rule.most:
            raise ValueError(
                f"expert_shards={shards}: gang.expert_autoscaling keeps them between {rule.least} and {rule.most}; ask "
                "for one of these, or deploy anew with another min or max"
            )

    def report(self, who: str, stats: Stats) -> None:
        """An attention worker's totals."""
        self._waits.report(who, stats)

    def look(self, gang: Now, now: float) -> Change | None:
        """What is to be asked for, if anything."""
        change = None
        if self._asked is not None:
            change = self._follow(self._asked, gang, now)
        elif self.rule is not None and gang.wanted > gang.served:  # fewer need nobody to come
            self._asked = _Asked(gang.wanted, now, gang.served, None)
        if gang.served != self._shards:
            self._votes.clear()
            self._came = self._came if self._came is not None and self._came.shards == gang.served else None
            self._shards = gang.served
        if self._asked is not None or not gang.settled or gang.wanted != gang.served:
            self._waits.clear()
            return change
        if (window := self._waits.window(gang.workers, now)) is None:
            return change
        self.share = window.share
        return change if self.rule is None else change or self._vote(window, self.rule, now)

    def _follow(self, asked: _Asked, gang: Now, now: float) -> Change | None:
        """A change that is under way: it has happened, somebody wants another one, or it takes too long."""
        if gang.wanted != asked.shards:
            self._asked = None
        elif gang.served == asked.shards:
            self._asked, self._came = None, asked if asked.shards > asked.before and asked.share is not None else None
        elif now - asked.since >= THERE_WITHIN_S:
            self._asked = None
            self._rest(now)
            return Change(gang.served, f"{asked.shards} of them were not there after {THERE_WITHIN_S:g} s")
        return None

    def _vote(self, window: Window, rule: WaitRule, now: float) -> Change | None:
        self._votes.append(Vote(window, wanted(window, self._shards, rule)))
        self._forget(max(rule.upscale_delay_s, rule.downscale_delay_s))
        self._judge(rule, now)
        shards, seen = decide(self._votes, self._shards, rule)
        if shards == self._shards or (shards > self._shards and now < self._rest_until):
            return None
        self._asked = _Asked(shards, now, self._shards, seen.share)
        return Change(shards, _why(seen))

    def _judge(self, rule: WaitRule, now: float) -> None:
        """Whether the shards that came last have helped, once that can be told."""
        came, after = self._came, together(last(self._votes, rule.upscale_delay_s))
        if came is None or came.share is None or not after.step_s:
            return
        self._came = None
        hoped = came.share - expected_share(came.share, came.before, came.shards)
        if after.share > came.share - HELPS * hoped:
            self._rest(now)
        else:
            self._rest_s = REST_S

    def _rest(self, now: float) -> None:
        self._rest_until = now + self._rest_s
        self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)

    def _forget(self, seconds: float) -> None:
        """Votes that nothing goes by any more."""
        covered = sum(vote.window.seconds for vote in self._votes)
        while len(self._votes) > 1 and (covered := covered - self._votes[0].window.seconds) >= seconds:
            del self._votes[0]


def _why(seen: Window) -> str:
    if not seen.step_s:
        return f"nothing has run for {seen.seconds:.0f} s"
    return (
        f"in the last {seen.seconds:.0f} s attention workers were in steps for {seen.busy:.0%} of the time, and waited "
        f"for experts for {seen.share:.0%} of that at least"
    )
