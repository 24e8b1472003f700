"""Who gets a seat and who loses it, and when an epoch forms."""

from __future__ import annotations

from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.seats import Address, GangShape, Seat
from tests.support.rosters import STORE, enter_all, fill, make_roster, seats_of


def test_no_epoch_forms_while_a_holder_loads_the_weights_of_its_seat() -> None:
    roster = Roster(GangShape(2, 2, colocated=True), STORE, lease_s=10.0, grace_s=2.0)
    assert roster.join("a", "attention", Address("h"), 0.0, loading=True) == Seat("attention", 0)
    assert roster.join("b", "attention", Address("h"), 0.0, loading=True) == Seat("attention", 1)
    roster.loaded("a")
    roster.loaded("nobody")
    assert roster.membership is None
    assert roster.explain() == "waiting for attention:1 to load"
    roster.loaded("b")
    assert roster.membership is not None
    assert roster.directive("b").action == "enter"
    roster.leave("a", "it died", 1.0)
    roster.left("b", 1, "told to", 1.0)
    assert roster.join("c", "attention", Address("h"), 2.0, loading=True) == Seat("attention", 0)
    assert roster.membership is None
    roster.loaded("c")
    assert roster.membership is not None


def test_a_worker_that_wants_its_seat_back_does_not_push_out_who_has_it() -> None:
    roster = make_roster(workers=2, shards=0)
    assert roster.join("new", "attention", Address("h"), 0.0) == Seat("attention", 0)
    assert roster.join("old", "attention", Address("h"), 0.0, index=0) is None
    assert roster.join("old", "attention", Address("h"), 0.0, index=1) == Seat("attention", 1)


def test_epoch_forms_when_every_seat_is_held() -> None:
    roster = make_roster()
    roster.join("w", "attention", Address("a", 7), 0.0)
    roster.join("s1", "expert", Address("b"), 0.0, index=1)
    assert roster.membership is None
    assert "missing expert:0" in roster.explain()
    roster.join("s0", "expert", Address("c"), 0.0, index=0)
    assert roster.membership is not None
    assert roster.membership.holders == ("w", "s0", "s1")
    assert roster.membership.leader == Address("a", 7)
    assert not roster.ready()
    enter_all(roster, ["w", "s0", "s1"])
    assert roster.ready()


def test_an_epoch_forms_of_those_who_are_there() -> None:
    roster = make_roster(workers=3, shards=1, least=1)
    roster.join("a", "attention", Address("a"), 0.0, index=1)
    assert roster.membership is None, "not without every expert"
    roster.join("s", "expert", Address("s"), 0.0, index=0)
    assert seats_of(roster) == ["attention:1", "expert:0"]
    membership = roster.membership
    assert membership is not None
    assert (membership.workers, membership.shards, membership.leader) == ({1: 0}, {0: 1}, Address("a"))
    assert membership.rank(Seat("expert", 0)) == 1
    enter_all(roster, ["a", "s"])
    assert roster.ready()
    assert roster.explain() == "epoch 1 serves, without attention:0, attention:2"


def test_a_worker_without_a_free_seat_waits() -> None:
    roster = make_roster(workers=1)
    assert roster.join("a", "attention", Address("h"), 0.0) == Seat("attention", 0)
    assert roster.join("b", "attention", Address("h"), 0.0) is None
    assert roster.join("a", "attention", Address("h"), 0.0) == Seat("attention", 0)


def test_who_was_told_another_spec_gets_no_seat() -> None:
    roster = Roster(GangShape(1, 1), STORE, lease_s=5.0, grace_s=1.0, spec="one")
    assert roster.join("a", "attention", Address("a"), 0.0, spec="other") is None
    assert roster.join("s", "expert", Address("s"), 0.0, index=0, spec="one") == Seat("expert", 0)
    assert roster.join("t", "expert", Address("s"), 0.0, index=0, spec="other") is None, "nor takes a seat over"
    assert [holder.holder_id for holder in roster.holders()] == ["s"]
    assert roster.explain().endswith("missing attention:0; refused for another spec: attention, expert")
    assert roster.join("a", "attention", Address("a"), 0.0, spec="one") == Seat("attention", 0)


def test_an_abort_leads_to_the_next_epoch_when_all_have_left() -> None:
    roster = make_roster()
    ids = fill(roster)
    epoch = enter_all(roster, ids)
    roster.left(ids[0], epoch, "a transfer failed", 1.0)
    assert roster.membership is None
    assert roster.directive(ids[0]).action == "stay"
    for holder_id in ids[1:]:
        directive = roster.directive(holder_id)
        assert (directive.action, directive.epoch) == ("leave", epoch)
        assert roster.directive(holder_id).action == "stay", "told once"
    roster.left(ids[1], epoch, "told to", 1.0)
    assert roster.membership is None, "one is still in the old epoch"
    roster.left(ids[2], epoch, "told to", 1.0)
    assert roster.membership is not None
    assert roster.membership.epoch == epoch + 1


def test_stale_and_repeated_reports_change_nothing() -> None:
    roster = make_roster()
    ids = fill(roster)
    first = enter_all(roster, ids)
    for holder_id in ids:
        roster.left(holder_id, first, "x", 0.0)
        roster.left(holder_id, first, "again", 0.0)
    second = enter_all(roster, ids)
    assert second == first + 1
    for stale in (first, second + 5):
        roster.left(ids[1], stale, "stale", 0.0)
    roster.left("nobody", second, "unknown", 0.0)
    assert roster.ready()


def test_a_restarted_shard_takes_its_seat_over() -> None:
    roster = make_roster()
    ids = fill(roster)
    epoch = enter_all(roster, ids)
    assert roster.join("new", "expert", Address("new"), 1.0, index=1) == Seat("expert", 1)
    assert roster.directive(ids[2]).action == "rejoin"
    for holder_id in ids[:2]:
        roster.left(holder_id, epoch, "x", 1.0)
    assert roster.membership is not None
    assert roster.membership.holders == (*ids[:2], "new")


def test_a_lapsed_lease_frees_the_seat_and_a_break_shortens_leases() -> None:
    roster = make_roster()
    ids = fill(roster)
    epoch = enter_all(roster, ids)
    roster.left(ids[0], epoch, "x", 1.0)
    roster.beat(ids[0], 2.0)
    roster.beat(ids[1], 2.0)
    roster.expire(2.9)
    assert roster.directive(ids[2]).action == "leave"
    roster.expire(3.1)
    assert roster.directive(ids[2]).action == "rejoin", "not heard of within the grace after the break"
    assert "missing expert:1" in roster.explain()


def test_one_of_another_spec_does_not_resume() -> None:
    roster = make_roster()
    assert not roster.resume("w", Seat("attention", 0), Address("h"), 0.0, spec="another")
    assert not list(roster.holders())


def test_who_resumes_has_left_what_it_says_to_have_left() -> None:
    """Its report was lost on the way."""
    roster = make_roster()
    ids = fill(roster)
    epoch = enter_all(roster, ids)
    assert roster.resume(ids[0], Seat("attention", 0), Address("h"), 1.0, None)
    assert roster.membership is None
    for holder_id in ids[1:]:
        roster.left(holder_id, epoch, "told to", 1.0)
    assert roster.membership is not None
