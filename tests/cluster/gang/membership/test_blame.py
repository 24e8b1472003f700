"""Who is blamed for the end of an epoch: for whom the next one waits, and who stays out."""

from __future__ import annotations

from divisi.cluster.seats import Address, Seat
from tests.support.rosters import enter_all, fill, make_roster, seats_of


def test_who_is_blamed_is_not_waited_for_and_comes_back_if_it_lives() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    first, second, shard = ids = fill(roster)
    epoch = enter_all(roster, ids)
    roster.left(shard, epoch, "a transfer failed", 1.0, "attention:1, attention:0")
    assert roster.membership is None
    roster.left(first, epoch, "a transfer failed", 1.0, "attention:1")
    assert seats_of(roster) == ["attention:0", "expert:0"], "the first has said itself that it lives"
    enter_all(roster, [first, shard])
    assert (roster.directive(second).action, roster.directive(second).action) == ("leave", "stay")
    roster.left(second, epoch, "told to", 1.2, "expert:0")
    assert roster.ready(), "what it says of an epoch that is over harms nobody"
    assert roster.directive(first).action == "change"
    for holder_id in (first, shard):
        roster.left(holder_id, epoch + 1, "its membership changes", 1.3)
    assert seats_of(roster) == ["attention:0", "attention:1", "expert:0"]


def test_the_seat_of_who_is_blamed_and_silent_is_soon_free() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    first, _, shard = ids = fill(roster)
    epoch = enter_all(roster, ids)
    for holder_id in (first, shard):
        roster.left(holder_id, epoch, "a transfer failed", 1.0, "attention:1")
    assert roster.join("new", "attention", Address("new"), 1.1) is None
    roster.expire(2.6)
    assert roster.join("new", "attention", Address("new"), 2.6) == Seat("attention", 1)


def test_an_expert_that_is_blamed_is_waited_for() -> None:
    roster = make_roster(workers=2, shards=2, least=1)
    *others, shard = ids = fill(roster)
    epoch = enter_all(roster, ids)
    for holder_id in others:
        roster.left(holder_id, epoch, "a transfer failed", 1.0, "expert:1")
    assert roster.membership is None
    roster.left(shard, epoch, "its peers are gone", 1.1)
    assert len(seats_of(roster)) == 4


def test_a_worker_that_does_not_reach_its_peers_stays_out_ever_longer() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    good, bad, shard = fill(roster)
    now = 0.0
    for out_s in (1.0, 2.0, 4.0):
        for holder_id in (good, bad, shard):
            roster.beat(holder_id, now)
            assert roster.directive(holder_id).action == "enter"
        assert roster.membership is not None
        epoch = roster.membership.epoch
        roster.serving(good, epoch)
        roster.left(bad, epoch, "did not come", now, "expert:0")
        roster.left(shard, epoch, "did not come", now, "attention:1")
        roster.left(good, epoch, "told to", now)
        assert roster.membership is not None
        assert roster.membership.holders == (good, shard), "the others go on without it"
        roster.beat(bad, now)
        for holder_id in (good, shard):
            roster.beat(holder_id, now)
            assert roster.directive(holder_id).action == "enter"
            roster.serving(holder_id, epoch + 1)
        roster.expire(now + out_s - 0.1)
        assert roster.directive(good).action == "stay", "it is let in too soon"
        now += out_s
        for holder_id in (good, bad, shard):
            roster.beat(holder_id, now)
        roster.expire(now)
        assert roster.directive(good).action == "change"
        for holder_id in (good, shard):
            roster.left(holder_id, epoch + 1, "its membership changes", now)


def test_who_is_needed_is_not_kept_out() -> None:
    roster = make_roster(workers=2, shards=1, least=2)
    good, bad, shard = ids = fill(roster)
    epoch = enter_all(roster, ids)
    for holder in roster.holders():
        holder.serving = holder.holder_id == good
    for holder_id in (bad, shard, good):
        roster.left(holder_id, epoch, "a transfer failed", 1.0)
    assert roster.membership is not None
    assert roster.membership.holders == (good, bad, shard)
