"""Who comes and who goes between two steps."""

from __future__ import annotations

from divisi.cluster.seats import Address
from tests.support.rosters import enter_all, fill, make_roster, seats_of


def test_who_comes_is_let_in_between_two_steps() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    roster.join("a", "attention", Address("a"), 0.0)
    roster.join("s", "expert", Address("s"), 0.0, index=0)
    epoch = enter_all(roster, ["a", "s"])
    assert roster.directive("a").action == "stay"
    roster.join("b", "attention", Address("b"), 1.0)
    assert roster.ready(), "the epoch goes on"
    assert roster.directive("s").action == roster.directive("b").action == "stay"
    directive = roster.directive("a")
    assert (directive.action, directive.epoch) == ("change", epoch)
    assert roster.directive("a").action == "stay", "told once"
    roster.left("a", epoch, "its membership changes", 1.0)
    assert roster.membership is None
    roster.left("s", epoch, "its membership changes", 1.0)
    assert seats_of(roster) == ["attention:0", "attention:1", "expert:0"]
    assert enter_all(roster, ["a", "b", "s"]) == epoch + 1


def test_a_change_in_good_order_is_no_outage() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    roster.join("a", "attention", Address("a"), 0.0)
    roster.join("s", "expert", Address("s"), 0.0, index=0)
    epoch = enter_all(roster, ["a", "s"])
    roster.join("b", "attention", Address("b"), 1.0)
    roster.directive("a")
    roster.left("a", epoch, "its membership changes", 1.0)
    assert roster.membership is None
    assert roster.ready()
    roster.left("s", epoch, "its membership changes", 1.0)
    assert roster.ready(), "it forms"
    assert roster.explain() == f"epoch {epoch + 1} makes room for others"
    enter_all(roster, ["a", "b", "s"])
    assert roster.explain() == f"epoch {epoch + 1} serves"
    roster.left("b", epoch + 1, "a transfer failed", 2.0, "attention:0")
    assert not roster.ready(), "that is one"
    roster.leave("a", "it died", 2.1)
    assert roster.explain().startswith(f"waiting for expert:0 to leave epoch {epoch + 1}"), "a worker less is enough"


def test_the_last_worker_goes_and_nobody_is_told_that_it_serves() -> None:
    roster = make_roster(workers=2, shards=0, least=1)
    roster.join("a", "attention", Address("a"), 0.0)
    epoch = enter_all(roster, ["a"])
    roster.retire("a")
    assert roster.directive("a").action == "change"
    roster.left("a", epoch, "its membership changes", 1.0)
    assert roster.membership is None
    assert not roster.ready()


def test_who_breaks_a_change_off_makes_it_an_outage() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    roster.join("a", "attention", Address("a"), 0.0)
    roster.join("s", "expert", Address("s"), 0.0, index=0)
    epoch = enter_all(roster, ["a", "s"])
    roster.join("b", "attention", Address("b"), 1.0)
    roster.directive("a")
    for holder_id in ("a", "s"):
        roster.left(holder_id, epoch, "its membership changes", 1.0)
    assert roster.membership is not None
    roster.leave("s", "bye", 1.5)
    assert not roster.ready()


def test_who_wants_to_go_is_left_out_between_two_steps() -> None:
    roster = make_roster(workers=2, shards=1, least=1)
    ids = fill(roster)
    first, second, shard = ids
    epoch = enter_all(roster, ids)
    assert roster.retire(first), "the epoch has it yet"
    assert not roster.retire("nobody")
    assert roster.ready()
    assert roster.directive(first).action == "change", "it leads"
    for holder_id in ids:
        roster.left(holder_id, epoch, "its membership changes", 1.0)
    assert seats_of(roster) == ["attention:1", "expert:0"]
    assert not roster.retire(first)
    assert roster.directive(first).action == "stay"
    enter_all(roster, [second, shard])
    roster.leave(first, "bye", 2.0)
    assert roster.ready(), "nobody notices"
