"""Small numbers for processes without seats."""

from __future__ import annotations

from divisi.cluster.gang.membership.ordinals import LEASE_S, Ordinals


def test_the_lowest_free_number_and_the_same_again() -> None:
    known = Ordinals()
    assert [known.renew(name, "h", 1, 0.0) for name in "abc"] == [0, 1, 2]
    assert known.renew("b", "h", 9, 1.0) == 1
    assert known.all(1.0) == [(0, "h", 1), (1, "h", 9), (2, "h", 1)]


def test_who_is_not_heard_of_makes_room() -> None:
    known = Ordinals()
    known.renew("a", "h", 1, 0.0)
    known.renew("b", "h", 2, 0.0)
    known.renew("b", "h", 2, LEASE_S - 1)
    assert known.all(LEASE_S) == [(1, "h", 2)]
    assert known.renew("c", "h", 3, LEASE_S) == 0


def test_a_new_coordinator_gives_the_numbers_that_the_former_gave() -> None:
    known = Ordinals()
    assert known.renew("second", "h", 1, 0.0, former=1) == 1
    assert known.renew("first", "h", 2, 0.0, former=0) == 0
    assert known.renew("late", "h", 3, 0.0, former=1) == 2, "it is another's"
