"""Whom the next epoch takes of those who hold seats, and whether a running one is to end for the sake of one.

A worker that cannot reach a peer which others reach stays out for a while, twice as long each time, where the gang can
do without: else it would hold up every epoch for as long as ranks wait for each other at its beginning. Plain data, no
clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.seats import GangShape, Membership, Seat

_LONGEST_OUT_S = 60.0


def select(holders: Collection[Holder], shape: GangShape, least_workers: int, now: float) -> dict[Seat, Holder] | None:
    """All that can be in the next epoch, in rank order, but who is to stay out; None where they are too few."""
    able = {holder.seat: holder for holder in holders if holder.is_able}
    welcome = {seat: holder for seat, holder in able.items() if holder.out_until <= now}
    if sum(seat.role == "attention" for seat in welcome) >= least_workers:
        able = welcome
    return {seat: able[seat] for seat in shape.seats if seat in able} if shape.suffices(able, least_workers) else None


def somebody_comes_or_goes(current: Membership, holders: Collection[Holder], now: float) -> bool:
    """Whether the next epoch would have one more than the current one, or one less that wants to go."""
    comes = any(
        holder.is_able and holder.out_until <= now for holder in holders if holder.holder_id not in current.holders
    )
    return comes or any(holder.retiring for holder in holders if holder.holder_id in current.holders)


def note_misses(holders: Collection[Holder], now: float) -> None:
    """An epoch ends without order: count against its workers who have not reached their peers, if some have."""
    workers = [holder for holder in holders if holder.epoch and holder.seat.role == "attention"]
    if any(holder.serving for holder in workers):
        for holder in workers:
            holder.misses = 0 if holder.serving else holder.misses + 1
            holder.out_until = now + min(2.0 ** (holder.misses - 1), _LONGEST_OUT_S) if holder.misses else 0.0
