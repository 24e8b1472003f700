"""An expert shard before it has a share of the experts, and while it loads one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from divisi.cluster import expert_rank
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.expert_rank import ExpertRank
from divisi.cluster.gang.membership.coordinator import Coordinator
from divisi.cluster.gang.membership.vacancies import Applicant, Share
from divisi.cluster.seats import Address, GangShape, Seat
from tests.support.credentials import CREDENTIALS
from tests.support.thread_gang import HOST, new_coordinator, post_of, small_spec

SHAPE = GangShape(1, 2)


@pytest.fixture
def coordinator(small_model: Path) -> Iterator[Coordinator]:
    with contextlib.closing(StoreServer(HOST, CREDENTIALS)) as store:
        yield new_coordinator(small_spec(small_model, SHAPE), store)


def rank_of(small_model: Path, coordinator: Coordinator, own: int | None) -> ExpertRank:
    return ExpertRank(small_spec(small_model, SHAPE), post_of(coordinator, f"x:{own}"), own)


def test_a_spare_that_nobody_needs_ends_when_it_is_closed(small_model: Path, coordinator: Coordinator) -> None:
    spare = rank_of(small_model, coordinator, None)
    loaded: list[bool] = []
    thread = threading.Thread(target=lambda: loaded.append(spare.load()))
    thread.start()
    assert spare.is_spare
    spare.close()
    thread.join(10)
    assert loaded == [False]
    assert spare.experts is None


def test_a_spare_that_is_about_to_end_leaves_the_share_to_others(small_model: Path, coordinator: Coordinator) -> None:
    spec = small_spec(small_model, SHAPE)
    going = ExpertRank(spec, post_of(coordinator, "going"), orphaned=lambda: True)
    thread = threading.Thread(target=going.load)
    thread.start()
    seats = [coordinator.join(str(index), "expert", Address(HOST), index, spec=spec.fingerprint) for index in (0, 1)]
    coordinator.ended("1")
    other = rank_of(small_model, coordinator, None)
    assert other.load()
    assert Seat("expert", other.share or 0) == seats[1]
    for rank in (going, other):
        rank.close()
    thread.join(10)


def test_who_loads_keeps_what_is_promised_to_it(
    small_model: Path, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_rank, "_RENEW_S", 0.0)
    asked: list[float] = []
    vacancy = coordinator.vacancy

    def count(applicant: Applicant, wait_s: float) -> Share | None:
        asked.append(wait_s)
        return vacancy(applicant, wait_s)

    monkeypatch.setattr(coordinator, "vacancy", count)
    rank = rank_of(small_model, coordinator, 1)
    assert rank.load()
    assert rank.share == 1
    assert asked[0] > 0
    assert asked[1:]
    assert set(asked[1:]) == {0.0}
    assert rank.silent_s == 0.0, "who loads is silent for long"
    rank.close()
