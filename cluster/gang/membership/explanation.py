"""Why a gang isn't ready, for people. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection

from divisi.cluster.gang.membership.holder import Holder
from divisi.cluster.seats import GangShape, Membership


def whom_it_waits_for(
    shape: GangShape, holders: Collection[Holder], enough: bool, membership: Membership | None, epoch: int
) -> str:
    """Names the seats that are missing for the next epoch or in this one; `enough`: those who hold seats suffice."""
    held = {holder.seat for holder in holders}
    if not enough:
        missing = [seat for seat in shape.seats if seat not in held]
        return f"{len(held)} of {shape.size} seats filled, missing {', '.join(map(str, missing))}"
    if loading := sorted(str(holder.seat) for holder in holders if holder.loading):
        return f"waiting for {', '.join(loading)} to load"
    if membership is None:
        staying = sorted(str(holder.seat) for holder in holders if holder.epoch)
        return f"waiting for {', '.join(staying)} to leave epoch {epoch}"
    slow = sorted(
        str(holder.seat) for holder in holders if holder.holder_id in membership.holders and not holder.serving
    )
    return f"epoch {epoch} is forming, waiting for {', '.join(slow)}"
