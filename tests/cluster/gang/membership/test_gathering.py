"""A coordinator that follows on another one: what goes on, what is given up, and when; then any deaths in any order."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from divisi.cluster.gang.membership.gathering import Gathering
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.vacancies import Applicant
from divisi.cluster.seats import Address, GangShape, Seat
from tests.support.rosters import STORE, enter_all, fill, make_roster, resume_all, successor, wanted


def test_an_epoch_whose_members_are_all_back_goes_on() -> None:
    former = make_roster(workers=2, least=1)
    ids = fill(former)
    epoch = enter_all(former, ids)
    roster = successor(former)
    resume_all(roster, former, but=ids[0])
    assert (roster.gathering, roster.membership) == (True, None)
    assert {roster.directive(holder_id).action for holder_id in ids[1:]} == {"stay"}, "nobody is sent away meanwhile"
    assert roster.join("new", "attention", Address("h"), 1.0) is None, "the seat is another's"
    resume_all(roster, former)
    assert not roster.gathering
    assert roster.membership == former.membership
    assert not roster.ready(), "who serves says so"
    for holder_id in ids:
        roster.serving(holder_id, epoch)
    assert roster.ready()
    assert {roster.directive(holder_id).action for holder_id in ids} == {"stay"}


def test_an_epoch_that_lacks_a_member_is_waited_for_and_given_up() -> None:
    former = make_roster(workers=2, least=1)
    ids = fill(former)
    epoch = enter_all(former, ids)
    roster = successor(former)
    resume_all(roster, former, but=ids[0])
    roster.expire(3.9)
    assert roster.gathering
    roster.expire(4.0)
    assert not roster.gathering
    for holder_id in ids[1:]:
        assert roster.directive(holder_id).action == "leave"
        roster.left(holder_id, epoch, "told to", 4.1)
    assert roster.membership is not None
    assert (roster.membership.epoch, roster.membership.holders) == (100, tuple(ids[1:]))


@pytest.mark.parametrize("how", ["it has left the epoch", "a new process has its seat"])
def test_an_epoch_that_cannot_become_whole_is_given_up_at_once(how: str) -> None:
    former = make_roster(workers=2, shards=1, least=1)
    *others, shard = ids = fill(former)
    enter_all(former, ids)
    roster = successor(former)
    resume_all(roster, former, but=shard)
    if how == "a new process has its seat":
        assert roster.join("new", "expert", Address("h"), 1.0, index=0) is not None
        assert not roster.resume(shard, Seat("expert", 0), Address("h"), 1.0, former.membership)
    else:
        assert roster.resume(shard, Seat("expert", 0), Address("h"), 1.0, None)
    assert not roster.gathering
    assert {roster.directive(holder_id).action for holder_id in others} == {"leave"}


def test_a_gang_between_two_epochs_begins_the_next_once_all_are_back() -> None:
    former = make_roster()
    fill(former)
    roster = successor(former)
    resume_all(roster, former)
    assert roster.membership is not None
    assert roster.membership.epoch == 100


def test_the_next_epoch_is_above_any_that_somebody_was_in() -> None:
    """Epochs may follow each other faster than the seconds that they are numbered from."""
    former = Roster(GangShape(1, 1), STORE, lease_s=10.0, grace_s=2.0, first_epoch=500)
    ids = fill(former)
    enter_all(former, ids)
    roster = successor(former)
    resume_all(roster, former, but=ids[1])
    assert roster.resume(ids[1], Seat("expert", 0), Address("h"), 1.0, None)
    roster.left(ids[0], 500, "told to", 1.0)
    assert roster.membership is not None
    assert roster.membership.epoch == 501


def test_two_shards_died_at_once_and_the_coordinator_hung_before_both_seats_were_filled() -> None:
    """Who comes back is in no epoch, and the last seat is free for who was started in its place."""
    former = make_roster(workers=2, least=1)
    first, second, *shards = ids = fill(former)
    epoch = enter_all(former, ids)
    for holder_id in (first, second):
        former.left(holder_id, epoch, "a transfer failed", 0.1, "expert:0, expert:1")
    for holder_id in shards:
        former.ended(holder_id, 0.1)
    spare, cold = Applicant("spare", "h"), Applicant("expert:1", "h", 1)
    assert [wanted(former, spare, 0.1), wanted(former, spare, 0.1)] == [0, 0], "h is where who held it was"
    assert former.join("warm", "expert", Address("h", process="spare"), 0.4, index=0) is not None
    assert former.membership is None, "one is missing"
    roster = successor(former, until=14.0)
    roster.expire(10.0)
    assert roster.resume(first, Seat("attention", 0), Address("h"), 10.1)
    assert (roster.gathering, wanted(roster, cold, 10.1)) == (True, None), "the other worker may be in an epoch"
    assert roster.resume("warm", Seat("expert", 0), Address("h", process="spare"), 10.2)
    assert (roster.gathering, wanted(roster, cold, 10.2)) == (False, 1), "no epoch is without its experts"
    assert roster.join("seatless", "attention", Address("h"), 10.2) is None, "the other worker may come back"
    assert roster.resume(second, Seat("attention", 1), Address("h"), 10.3)
    assert roster.join("cold", "expert", Address("h", process="expert:1"), 10.4, index=1) is not None
    assert roster.membership is not None
    assert roster.membership.holders == (first, second, "warm", "cold")


def test_a_worker_is_in_every_epoch() -> None:
    former = make_roster(workers=2, least=1)
    first, second, *_ = fill(former)
    roster = successor(former)
    assert roster.resume(first, Seat("attention", 0), Address("h"), 1.0)
    assert roster.gathering
    assert roster.resume(second, Seat("attention", 1), Address("h"), 1.0)
    assert not roster.gathering


def test_of_a_colocated_gang_all_are_in_every_epoch() -> None:
    roster = Roster(GangShape(2, 2, colocated=True), STORE, 10.0, 2.0, gather_until=4.0)
    assert roster.resume("a", Seat("attention", 1), Address("h"), 1.0)
    assert not roster.gathering


def test_any_deaths_beside_the_coordinators() -> None:
    """Whoever lives comes back, in any order; an epoch of which nobody died goes on, another is given up with the last
    of its members that are back."""
    _follow_on_many()


def _given_up_by_claims_only(gathering: Gathering, inside: Mapping[str, int], held: Mapping[Seat, str]) -> bool:
    return False


def _given_up_for_anybody(gathering: Gathering, inside: Mapping[str, int], held: Mapping[Seat, str]) -> bool:
    return not all(inside.values())


def _given_up_for_the_specs_least(gathering: Gathering, inside: Mapping[str, int], held: Mapping[Seat, str]) -> bool:
    left = {seat for seat, holder_id in held.items() if not inside[holder_id]}
    return not gathering.shape.suffices(set(gathering.shape.seats) - left, gathering.shape.attention_workers)


@pytest.mark.parametrize("rule", [_given_up_by_claims_only, _given_up_for_anybody, _given_up_for_the_specs_least])
def test_these_histories_find_a_wrong_rule(rule: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gathering, "hopeless", rule)
    with pytest.raises(AssertionError, match="history"):
        _follow_on_many()


def _follow_on_many() -> None:
    for seed in range(600):
        _follow_on(random.Random(seed), f"history {seed}")


def _follow_on(rng: random.Random, history: str) -> None:
    shape = GangShape(rng.randint(1, 3), rng.randint(1, 3))
    former = Roster(shape, STORE, lease_s=10.0, grace_s=2.0, min_attention_workers=1)
    first = rng.randint(0, shape.attention_workers - 1)
    seats = [*shape.seats[first:], *shape.seats[:first]]  # those before it come too late for the epoch
    members = [str(seat) for seat in shape.seats[first:]]
    for number, seat in enumerate(seats):
        assert former.join(str(seat), seat.role, Address("h"), 0.0, seat.index) is not None
        if number == len(members) - 1:
            epoch = enter_all(former, members)
    dead = set(rng.sample(list(map(str, seats)), rng.choice([0, 0, 1, 1, 2])))
    broken = not dead.isdisjoint(members)
    roster = successor(former, until=100.0)
    roster.min_attention_workers = rng.choice([1, shape.attention_workers])  # what held at last is not known
    late: list[str] = []
    for holder in rng.sample(list(former.holders()), len(seats)):
        if holder.holder_id in dead:
            continue
        if roster.membership is None:
            assert roster.join("another", "attention", Address("h"), 1.0) is None, f"{history}: it takes a seat"
        inside = former.membership if holder.epoch and not (broken and rng.random() < 0.5) else None
        late += [holder.holder_id] if broken and inside else []
        resumed = roster.resume(holder.holder_id, holder.seat, holder.address, 1.0, inside, held=holder.held)
        assert resumed, f"{history}: its seat is gone"
        action = roster.directive(holder.holder_id).action
        assert broken or action in ("stay", "change"), f"{history}: {action}, though nobody died"
    for holder_id in late:
        roster.left(holder_id, epoch, "a transfer failed", 2.0)
    if not broken:
        assert roster.membership == former.membership, f"{history}: it does not go on"
    elif not shape.suffices([seat for seat in seats if str(seat) in dead], 1):
        assert not roster.gathering, f"{history}: for whom does it wait?"
        there = {holder.seat for holder in roster.holders()}
        formed = shape.suffices(there, roster.min_attention_workers)
        assert (roster.membership is not None) == formed, f"{history}: {roster.explain()}"
