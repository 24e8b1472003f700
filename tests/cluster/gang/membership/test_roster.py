"""Seats and epochs: the rules one by one, then random histories against the invariants."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.seats import Address, GangShape, Seat
from tests.support.rosters import STORE, enter_all, fill, make_roster


def test_ranks_number_workers_first() -> None:
    shape = GangShape(2, 3)
    assert [str(seat) for seat in shape.seats] == ["attention:0", "attention:1", "expert:0", "expert:1", "expert:2"]
    assert [shape.rank(seat) for seat in shape.seats] == list(range(5))
    assert list(shape.shard_ranks) == [2, 3, 4]


def test_colocated_ranks_hold_the_shards() -> None:
    shape = GangShape(3, 3, colocated=True)
    assert [str(seat) for seat in shape.seats] == ["attention:0", "attention:1", "attention:2"]
    assert (shape.size, list(shape.shard_ranks)) == (3, [])
    with pytest.raises(ValueError, match="as many expert shards"):
        GangShape(3, 2, colocated=True)


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


def test_a_worker_without_a_free_seat_waits() -> None:
    roster = make_roster(workers=1)
    assert roster.join("a", "attention", Address("h"), 0.0) == Seat("attention", 0)
    assert roster.join("b", "attention", Address("h"), 0.0) is None
    assert roster.join("a", "attention", Address("h"), 0.0) == Seat("attention", 0)


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


def seats_of(roster: Roster) -> list[str]:
    assert roster.membership is not None, roster.explain()
    assert len(roster.membership.holders) == len(roster.membership.addresses) == roster.membership.size
    return [str(seat) for seat in roster.membership.seats]


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


def test_who_was_told_another_spec_gets_no_seat() -> None:
    roster = Roster(GangShape(1, 1), STORE, lease_s=5.0, grace_s=1.0, spec="one")
    assert roster.join("a", "attention", Address("a"), 0.0, spec="other") is None
    assert roster.join("s", "expert", Address("s"), 0.0, index=0, spec="one") == Seat("expert", 0)
    assert roster.join("t", "expert", Address("s"), 0.0, index=0, spec="other") is None, "nor takes a seat over"
    assert [holder.holder_id for holder in roster.holders()] == ["s"]
    assert roster.explain().endswith("missing attention:0; refused for another spec: attention, expert")
    assert roster.join("a", "attention", Address("a"), 0.0, spec="one") == Seat("attention", 0)


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


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_keep_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    shape = GangShape(rng.randint(1, 3), rng.randint(0, 3))
    least = rng.randint(1, shape.attention_workers)
    roster = Roster(shape, STORE, lease_s=5.0, grace_s=1.0, min_attention_workers=least)
    now, names, known, last_epoch = 0.0, 0, [], 0
    inside: dict[str, int] = {}
    for _ in range(600):
        now += rng.random() * 0.4
        match rng.choice(["join", "loaded", "poll", "poll", "poll", "left", "leave", "retire", "stale", "silent"]):
            case "loaded" if known:
                roster.loaded(rng.choice(known))
            case "join":
                names += 1
                role = rng.choice(["attention", "expert"]) if shape.expert_shards else "attention"
                index = rng.randrange(shape.expert_shards) if role == "expert" else None
                loading = role == "attention" and rng.random() < 0.3
                if roster.join(f"h{names}", role, Address("h"), now, index, loading) is not None:
                    known.append(f"h{names}")
            case "poll" if known:
                for holder_id in rng.sample(known, len(known)):
                    roster.beat(holder_id, now)
                    directive = roster.directive(holder_id)
                    if directive.action == "enter":
                        assert holder_id not in inside, f"seed {seed}: sent into two epochs at once"
                        inside[holder_id] = directive.epoch
                        roster.serving(holder_id, directive.epoch)
                    elif directive.action == "leave" and rng.random() < 0.7:
                        assert inside.pop(holder_id) == directive.epoch
                        roster.left(holder_id, directive.epoch, "told to", now)
                    elif directive.action == "change":
                        assert roster.membership is not None
                        assert roster.membership.holders[0] == holder_id, f"seed {seed}: only the leader is told"
                        for member in roster.membership.holders:
                            if inside.pop(member, None):
                                roster.left(member, directive.epoch, "its membership changes", now)
                    elif directive.action == "rejoin":
                        known.remove(holder_id)
                        inside.pop(holder_id, None)
            case "left" if inside:
                holder_id = rng.choice(sorted(inside))
                blamed = rng.choice([None, *map(str, shape.seats)])
                roster.left(holder_id, inside.pop(holder_id), "abort", now, blamed)
            case "leave" if known and rng.random() < 0.1:
                roster.leave(rng.choice(known), "bye", now)
            case "retire" if known and rng.random() < 0.2:
                roster.retire(rng.choice(known))
            case "stale" if known:
                roster.left(rng.choice(known), last_epoch + 10, "stale", now)
            case "silent":
                roster.expire(now)
        holders = {h.holder_id: h for h in roster.holders()}
        seats = [h.seat for h in holders.values()]
        assert len(set(seats)) == len(seats) <= shape.size, f"seed {seed}"
        if (current := roster.membership) is not None:
            members = [holders[holder_id] for holder_id in current.holders]
            assert [member.seat for member in members] == list(current.seats), f"seed {seed}"
            assert len(current.workers) >= least, f"seed {seed}"
            assert len(current.shards) == shape.expert_shards, f"seed {seed}: not all experts are covered"
            assert current.epoch >= last_epoch, f"seed {seed}"
            if current.epoch > last_epoch:
                assert not any(member.retiring for member in members), f"seed {seed}"
            last_epoch = current.epoch
            assert {member.epoch for member in members} <= {0, current.epoch}, f"seed {seed}"
            late = [h for h in holders.values() if h.epoch not in (0, current.epoch)]
            assert all(h.suspected for h in late), f"seed {seed}: somebody was not waited for"
            assert not any(member.loading for member in members), f"seed {seed}: an epoch without somebody's weights"
        assert roster.ready() <= (roster.membership is not None), f"seed {seed}"
    # Left alone, with every seat refilled, the gang always comes back.
    for holder in list(roster.holders()):
        if holder.retiring:
            roster.leave(holder.holder_id, "bye", now)
    for seat in shape.seats:
        roster.join(f"last-{seat}", seat.role, Address("h"), now, seat.index if seat.role == "expert" else None)
    for holder in list(roster.holders()):
        roster.loaded(holder.holder_id)
        roster.left(holder.holder_id, holder.epoch, "end", now)
    assert roster.membership is not None, f"seed {seed}: {roster.explain()}"
