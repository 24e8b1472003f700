"""A gang's roster, filled and in an epoch, and the one that follows on it."""

from __future__ import annotations

from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.vacancies import Applicant
from divisi.cluster.seats import Address, GangShape

STORE = Address("127.0.0.1", 1)


def make_roster(workers: int = 1, shards: int = 2, least: int | None = None) -> Roster:
    return Roster(GangShape(workers, shards), STORE, lease_s=10.0, grace_s=2.0, min_attention_workers=least)


def fill(roster: Roster, now: float = 0.0) -> list[str]:
    ids = []
    for seat in roster.shape.seats:
        holder_id = f"{seat}@{now}"
        index = seat.index if seat.role == "expert" else None
        if roster.join(holder_id, seat.role, Address("h"), now, index) is not None:
            ids.append(holder_id)
    return ids


def enter_all(roster: Roster, ids: list[str]) -> int:
    directives = [roster.directive(holder_id) for holder_id in ids]
    assert {d.action for d in directives} == {"enter"}
    epoch = directives[0].epoch
    for holder_id in ids:
        roster.serving(holder_id, epoch)
    return epoch


def seats_of(roster: Roster) -> list[str]:
    assert roster.membership is not None, roster.explain()
    assert len(roster.membership.holders) == len(roster.membership.addresses) == roster.membership.size
    return [str(seat) for seat in roster.membership.seats]


def wanted(roster: Roster, applicant: Applicant, now: float) -> int | None:
    """The seat that an applicant is to load for."""
    share = roster.vacancy(applicant, now)
    return None if share is None else share.index


def successor(roster: Roster, until: float = 4.0) -> Roster:
    """What comes after it, and knows nothing."""
    return Roster(
        roster.shape, STORE, lease_s=10.0, grace_s=2.0, first_epoch=100,
        min_attention_workers=roster.min_attention_workers, gather_until=until,
    )  # fmt: skip


def resume_all(roster: Roster, former: Roster, but: str = "") -> None:
    for holder in former.holders():
        if holder.holder_id != but:
            inside = former.membership if holder.epoch else None
            assert roster.resume(holder.holder_id, holder.seat, holder.address, 1.0, inside, held=holder.held)
