"""Whom the next epoch takes of those who hold seats, and whether a running one is to end for the sake of one.

A worker that cannot reach a peer which others reach stays out for a while, twice as long each time, where the gang can
do without: else it would hold up every epoch for as long as ranks wait for each other at its beginning. Plain data, no
clock. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.gang.membership.layout.layouts import Held, Layouts
from divisi.cluster.seats import GangShape, Membership, Seat
from divisi.model.placement import Layout

_LONGEST_OUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Selection:
    """Who is to be in an epoch."""

    shape: GangShape
    members: dict[Seat, Holder]
    """In rank order."""
    layout: Layout | None
    """None where no rank holds nothing but experts."""


def select(
    holders: Collection[Holder], shape: GangShape, layouts: Layouts | None, least_workers: int, now: float
) -> Selection | None:
    """All that can be in the next epoch and have something to do there, but who is to stay out; None where they are too
    few."""
    able = [holder for holder in holders if holder.is_able]
    welcome = [holder for holder in able if holder.out_until <= now]
    if sum(holder.seat.role == "attention" for holder in welcome) >= least_workers:
        able = welcome
    layout = None
    if layouts is not None:
        if (layout := layouts.choose(held_by(able))) is None:
            return None
        shape = replace(shape, expert_shards=len(layout.served))
    seated = {holder.seat: holder for holder in able if layout is None or _has_work(holder, layout)}
    if sum(seat.role == "attention" for seat in seated) < (shape.size if shape.colocated else least_workers):
        return None
    return Selection(shape, {seat: seated[seat] for seat in shape.seats if seat in seated}, layout)


def held_by(holders: Iterable[Holder]) -> dict[int, Held]:
    """What the shards among them hold, by the index of their seats."""
    return {
        holder.seat.index: Held(holder.held, holder.address.host) for holder in holders if holder.seat.role == "expert"
    }


def is_to_change(current: Membership, holders: Collection[Holder], layouts: Layouts | None, now: float) -> bool:
    """Whether the next epoch would have one more than the current one, or one less that wants to go, or a layout that
    is rather to be served."""
    members = set(current.holders)
    if any(holder.retiring for holder in holders if holder.holder_id in members):
        return True
    others = [holder for holder in holders if holder.holder_id not in members]
    coming = [holder for holder in others if holder.is_able and holder.out_until <= now]
    if any(holder.seat.role == "attention" for holder in coming):
        return True
    if layouts is None or current.layout is None:
        return False
    staying = [holder for holder in holders if holder.holder_id in members and not holder.loading]
    layout = layouts.choose(held_by(staying + coming))
    return layout is not None and layouts.is_better(layout, current.layout)


def _has_work(holder: Holder, layout: Layout) -> bool:
    index = holder.seat.index
    return holder.seat.role == "attention" or (index < len(layout.served) and bool(layout.served[index]))


def note_misses(holders: Collection[Holder], now: float) -> None:
    """An epoch ends without order: count against its workers who have not reached their peers, if some have."""
    workers = [holder for holder in holders if holder.epoch and holder.seat.role == "attention"]
    if any(holder.serving for holder in workers):
        for holder in workers:
            holder.misses = 0 if holder.serving else holder.misses + 1
            holder.out_until = now + min(2.0 ** (holder.misses - 1), _LONGEST_OUT_S) if holder.misses else 0.0
