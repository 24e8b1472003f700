"""What a coordinator learns of its predecessor's gang: the holders come back, and tell which epoch they are in.

An epoch whose members are all back is adopted and goes on, without any of them having noticed. There can be none once
those who are back and in no epoch leave too few for one: every epoch has all experts, and a worker. Plain data, no
clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from divisi.cluster.seats import GangShape, Membership, Seat
from divisi.model.placement import Layout


@dataclass(slots=True)
class Gathering:
    """Goes on until an epoch is whole, or none can become so any more, or `until` (seconds) at most."""

    shape: GangShape
    """Seats that every epoch has filled, but for its workers: of those it has some."""
    until: float
    _claimed: dict[int, Membership] = field(default_factory=dict)

    @property
    def last_layout(self) -> Layout | None:
        """That of the last epoch that somebody is in."""
        return self._claimed[max(self._claimed)].layout if self._claimed else None

    def need(self, expert_shards: int) -> None:
        """It is known that there are to be so many: no more are in every epoch."""
        if not self.shape.colocated:
            self.shape = replace(self.shape, expert_shards=min(self.shape.expert_shards, expert_shards))

    def claim(self, membership: Membership) -> None:
        """A holder is in that epoch."""
        self._claimed[membership.epoch] = membership

    def whole(self, inside: Mapping[str, int]) -> Membership | None:
        """The epoch whose members are all back and in it; `inside`: which one each holder is in."""
        for membership in self._claimed.values():
            if all(inside.get(holder_id) == membership.epoch for holder_id in membership.holders):
                return membership
        return None

    def hopeless(self, inside: Mapping[str, int], held: Mapping[Seat, str]) -> bool:
        """Whether none can become whole: those who are in no epoch leave too few for one, or each that somebody is in
        lacks a member, which has left it or whose seat another has by now."""
        left = {seat for seat, holder_id in held.items() if not inside[holder_id]}
        if not self.shape.suffices(set(self.shape.seats) - left, least_workers=1):
            return True
        return bool(self._claimed) and all(
            any(
                held.get(seat, holder_id) != holder_id or inside.get(holder_id, membership.epoch) != membership.epoch
                for seat, holder_id in zip(membership.seats, membership.holders, strict=True)
            )
            for membership in self._claimed.values()
        )
