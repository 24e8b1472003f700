"""Which seat an expert shard's process is to load for: no Ray, no threads, no clock."""

from __future__ import annotations

from divisi.cluster.gang.membership.directive import Directive
from divisi.cluster.gang.membership.roster import Roster
from divisi.cluster.gang.membership.vacancies import Applicant, Vacancies
from divisi.cluster.seats import Address, GangShape, Membership
from tests.support.rosters import wanted

FIRST, SECOND = Applicant("expert:0", "a", 0), Applicant("expert:1", "b", 1)
BESIDE_FIRST, BESIDE_SECOND = Applicant("spare:a", "a"), Applicant("spare:b", "b")


def vacancies() -> Vacancies:
    return Vacancies(range(2), since=0.0)


def test_each_takes_its_own_at_first_whoever_comes_first() -> None:
    found = vacancies()
    assert found.find(SECOND, {}, 0.1) == 1
    assert found.find(BESIDE_FIRST, {}, 0.2) is None, "nobody has died"
    assert found.find(FIRST, {}, 0.3) == 0


def test_its_own_comes_before_one_that_has_been_free_for_long() -> None:
    assert vacancies().find(SECOND, {}, 100.0) == 1


def test_a_spare_takes_the_seat_of_who_died_beside_it_and_that_one_is_the_next_spare() -> None:
    found = vacancies()
    found.freed(0, "a", 10.0)
    held = {1: "expert:1"}
    assert found.find(BESIDE_SECOND, held, 10.0) is None, "on another machine it would share cores"
    assert found.find(BESIDE_FIRST, held, 10.0) == found.find(BESIDE_FIRST, held, 10.1) == 0
    assert found.find(FIRST, held, 12.0) is None, "it is promised"
    held[0] = "spare:a"
    assert found.find(FIRST, held, 13.0) is None
    found.freed(0, "a", 14.0)
    del held[0]
    assert found.find(FIRST, held, 14.0) == 0


def test_a_seat_that_stays_free_goes_to_any_machine() -> None:
    found = vacancies()
    found.freed(0, "a", 10.0)
    held = {1: "expert:1"}
    assert found.find(BESIDE_SECOND, held, 14.9) is None
    assert found.find(BESIDE_SECOND, held, 15.1) == 0


def test_a_promise_lapses_unless_it_is_asked_for_again() -> None:
    found = vacancies()
    found.freed(0, "a", 10.0)
    held = {1: "expert:1"}
    assert found.find(BESIDE_FIRST, held, 10.0) == 0
    assert found.find(BESIDE_FIRST, held, 20.0) == 0
    assert found.find(FIRST, held, 30.0) is None, "asked for again"
    assert found.find(FIRST, held, 35.1) == 0


def test_a_promise_that_is_not_asked_for_again_at_once_lapses_at_once() -> None:
    """Who waited may have died with the one whose seat it is given."""
    found = vacancies()
    found.freed(0, "a", 10.0)
    held = {1: "expert:1"}
    assert found.find(BESIDE_FIRST, held, 10.0) == 0
    assert found.find(FIRST, held, 10.4) is None
    assert found.find(FIRST, held, 10.6) == 0


def test_where_the_spare_is_silent_too_another_machines_takes_the_seat() -> None:
    found, held = vacancies(), {1: "expert:1"}
    found.waits(BESIDE_FIRST, 11.0)
    found.freed(0, "a", 10.0)
    found.waits(BESIDE_SECOND, 11.5)
    assert found.find(BESIDE_SECOND, held, 11.2) is None, "it may still ask"
    assert found.find(BESIDE_SECOND, held, 11.4) == 0


def test_where_a_spare_waits_still_another_machines_does_not_take_the_seat() -> None:
    found, held = vacancies(), {1: "expert:1"}
    found.waits(BESIDE_FIRST, 11.0)
    found.waits(Applicant("expert:0", "a", returned=True), 14.0)
    found.freed(0, "a", 10.0)
    assert found.find(BESIDE_SECOND, held, 13.0) is None


def test_a_spare_that_loads_is_not_silent() -> None:
    """Of two that died on its machine the other one's place is taken by what starts there."""
    found, held = Vacancies(range(3), since=0.0), {1: "expert:1"}
    found.waits(BESIDE_FIRST, 11.0)
    found.freed(0, "a", 10.0)
    found.freed(2, "a", 10.0)
    assert found.find(BESIDE_FIRST, held, 10.0) == found.find(BESIDE_FIRST, held, 10.1) == 0
    assert found.find(BESIDE_SECOND, held, 13.0) is None
    assert found.find(Applicant("expert:0", "a", 0), held, 13.0) == 2


def test_who_comes_back_does_not_take_the_seat_of_who_was_started_in_its_place() -> None:
    back = Applicant("expert:0", "a", returned=True)
    assert vacancies().find(back, {0: "expert:0", 1: "expert:1"}, 20.0) is None


def test_a_promise_is_void_once_its_seat_was_held() -> None:
    found = vacancies()
    found.freed(0, "a", 10.0)
    assert found.find(BESIDE_FIRST, {1: "expert:1"}, 10.0) == 0
    found.freed(0, "a", 11.0)
    assert found.find(FIRST, {1: "expert:1"}, 11.0) == 0


def test_a_process_that_is_started_in_anothers_place_loads_for_its_seat_while_that_one_serves() -> None:
    found, moved = vacancies(), Applicant("expert:0", "c", 0)
    assert found.find(moved, {0: "expert:0", 1: "expert:1"}, 20.0) == 0
    assert found.find(moved, {0: "spare:a", 1: "expert:0"}, 20.0) == 1, "the seat that its former process has"


class Gang:
    """One worker and one shard in an epoch that serves."""

    def __init__(self) -> None:
        self.roster = Roster(GangShape(1, 1), Address("s"), lease_s=10.0, grace_s=4.0)
        self.roster.join("w", "attention", Address("a"), 0.0)
        self.roster.join("e", "expert", Address("a", process="expert:0"), 0.0, index=0)
        for holder_id in ("w", "e"):
            directive: Directive = self.roster.directive(holder_id)
            assert directive.action == "enter"
            self.roster.serving(holder_id, directive.epoch)
        assert self.roster.membership is not None
        self.membership: Membership = self.roster.membership

    def blame(self, now: float) -> None:
        self.roster.left("w", self.membership.epoch, "closed", now, "expert:0")

    def wants(self, now: float) -> int | None:
        self.roster.expire(now)
        return wanted(self.roster, BESIDE_FIRST, now)


def test_a_seat_is_free_as_soon_as_a_neighbour_has_seen_its_holder_die() -> None:
    gang = Gang()
    gang.blame(1.0)
    assert gang.wants(1.0) is None
    gang.roster.ended("e", 1.01)
    assert gang.wants(1.02) == 0
    assert gang.roster.join("x", "expert", Address("a", process="spare:a"), 1.2, index=0) is not None
    assert gang.roster.membership is not None
    assert gang.roster.membership.epoch > gang.membership.epoch


def test_a_death_that_only_a_neighbour_has_seen_ends_the_epoch() -> None:
    gang = Gang()
    gang.roster.ended("e", 1.0)
    assert gang.wants(1.0) == 0
    assert gang.roster.directive("w") == Directive("leave", epoch=gang.membership.epoch)
    gang.roster.ended("e", 2.0)
    gang.roster.ended("somebody", 2.0)


def test_who_is_blamed_alone_keeps_its_seat_for_a_moment() -> None:
    gang = Gang()
    gang.roster.beat("e", 0.9)
    gang.blame(1.0)
    gang.roster.beat("w", 2.3)
    assert gang.wants(2.3) is None
    assert gang.wants(2.5) == 0


def test_who_is_blamed_and_has_long_been_silent_keeps_it_for_a_last_word() -> None:
    gang = Gang()
    gang.roster.beat("w", 2.0)
    gang.blame(2.1)
    assert gang.wants(2.5) is None
    assert gang.wants(2.7) == 0


def test_a_last_word_is_enough() -> None:
    gang = Gang()
    gang.blame(2.1)
    gang.roster.beat("e", 2.5)
    assert gang.wants(2.7) is None


def test_nobody_is_wanted_while_a_former_gang_may_come_back() -> None:
    roster = Roster(GangShape(1, 1), Address("s"), 10.0, 4.0, gather_until=4.0)
    assert wanted(roster, FIRST, 1.0) is None
    roster.expire(4.0)
    assert wanted(roster, FIRST, 4.0) == 0
