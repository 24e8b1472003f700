"""All that changes which shard serves which experts, of one gang: a number that is asked for, by somebody or by the
policy, and moves for the sake of balance. Plain data, no clock; one at a time. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from divisi.cluster.gang.membership.figures import Figures
from divisi.cluster.gang.membership.layout.autoscaling import ExpertAutoscaling, Now
from divisi.cluster.gang.membership.layout.rebalancing import Rebalancing
from divisi.cluster.gang.membership.layout.scaling import ScaleStatus, Scaling
from divisi.cluster.gang.membership.layout.wait_policy import WaitRule
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.gang.membership.vacancies import Applicant

_ASKED = "it was asked for"


class ExpertChanges:
    """Has the roster's layout changed, and tells how that goes."""

    def __init__(
        self, roster: Roster, figures: Figures, virtual_shards: int, rebalance: bool, rule: WaitRule | None
    ) -> None:
        """`figures`: what the ranks have told; `rule`: by what there are more shards or fewer."""
        self._roster, self._figures = roster, figures
        self._scaling = Scaling()
        self._rebalancing = Rebalancing(virtual_shards) if rebalance else None
        self._autoscaling = ExpertAutoscaling(rule)

    def scale(self, expert_shards: int, now: float) -> None:
        """Somebody asks for so many. Raises ValueError, for people, where there cannot be so many."""
        self._autoscaling.check(expert_shards)
        self._have(expert_shards, _ASKED, now)

    def told(self, now: float) -> None:
        """Who starts processes knows how many are wanted."""
        self._scaling.told(now)

    def asked(self, applicant: Applicant, now: float) -> None:
        """A process that could serve experts is wanted."""
        self._scaling.asked(applicant, now)

    def note_stats(self, holder_id: str, stats: Stats, now: float) -> None:
        """What a rank has told."""
        rows = stats.get("leaf_rows")
        if self._rebalancing is not None and isinstance(rows, Mapping):
            self._rebalancing.report(holder_id, rows, now)
        self._autoscaling.report(holder_id, stats)

    def look(self, now: float) -> bool:
        """Begin what is due; whether there is anything else to be done now than before."""
        begun = self._rebalance(now) or self._autoscale(now)
        self._scaling.look(self._lacking(), self._roster.ready(), now)
        return begun

    def status(self, unplaced: str) -> ScaleStatus:
        """How far the last change of the number has come. `unplaced`: which processes have no node, for people."""
        waits_for = self._lacking() or []
        waits_for += [f"{who} could not load: {text}" for who, text in self._figures.failures.items() if waits_for]
        waits_for += [unplaced] if waits_for and unplaced else []
        if not waits_for and not self._scaling.is_over:
            waits_for = ["the next epoch"]
        return ScaleStatus(
            self._roster.plan.served_shape.expert_shards,
            self._roster.plan.wanted_shards,
            tuple(waits_for),
            self._scaling.seconds(),
            self._scaling.bytes_read(self._figures.weights_read()),
            frozenset(holder.address.process for holder in self._roster.holders() if holder.seat.role == "expert"),
            self._scaling.why,
        )

    def numbers(self) -> dict[str, float]:
        """For metrics."""
        plan = self._roster.plan
        if plan.moves is None:
            return {}
        return {
            "expert_shards": plan.served_shape.expert_shards,
            "expert_shards_wanted": plan.wanted_shards,
            "expert_wait": self._autoscaling.share,
            **({} if self._rebalancing is None else self._rebalancing.numbers()),
        }

    def _have(self, expert_shards: int, why: str, now: float) -> None:
        before = self._roster.plan.wanted_shards
        self._roster.scale(expert_shards, now)
        if expert_shards != before:
            served = self._roster.plan.served_shape.expert_shards
            self._scaling.begin(served, self._figures.weights_read(), why, now)

    def _autoscale(self, now: float) -> bool:
        plan, current = self._roster.plan, self._roster.membership
        if plan.moves is None:
            return False
        members = () if current is None else current.holders
        workers = [
            holder.holder_id
            for holder in self._roster.holders()
            if holder.seat.role == "attention" and holder.holder_id in members
        ]
        served, settled = plan.served_shape.expert_shards, self._roster.settled is not None
        change = self._autoscaling.look(Now(served, plan.wanted_shards, workers, settled), now)
        if change is not None:
            self._have(change.shards, change.why, now)
        return change is not None

    def _rebalance(self, now: float) -> bool:
        moves = self._roster.plan.moves
        if self._rebalancing is None or moves is None:
            return False
        return self._rebalancing.look(moves, self._roster.settled, self._figures.weights_read(), now)

    def _lacking(self) -> list[str] | None:
        return self._roster.plan.lacking(list(self._roster.holders()))
