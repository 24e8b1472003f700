"""The router as Serve calls it, on replicas that are stood in for."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from divisi.cluster.request import Request, Sampling
from divisi.deploy.routing import WorkerReport
from divisi.deploy.serve_router import QueuedTokensRouter


def replica(name: str, queued: int | None) -> Any:
    stats = {} if queued is None else WorkerReport(0.0, queued, 0).to_dict()
    return SimpleNamespace(replica_id=name, routing_stats=stats)


def pending(number: int, prompt_tokens: int = 10) -> Any:
    request = Request(f"r{number}", (1,) * prompt_tokens, 4, Sampling())
    return SimpleNamespace(args=[request], metadata=SimpleNamespace(internal_request_id=str(number)))


@pytest.fixture
def router() -> QueuedTokensRouter:
    made = QueuedTokensRouter.__new__(QueuedTokensRouter)  # its constructor wants a running Serve
    made.initialize_state(ingress_replicas=1)
    return made


def preferred(router: QueuedTokensRouter, replicas: list[Any], request: Any) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(replicas, request))
    return [candidate.replica_id for candidate in ranks[0]]  # type: ignore[misc]


def test_the_shorter_queue_is_preferred_and_others_follow(router: QueuedTokensRouter) -> None:
    replicas = [replica("a", 5000), replica("b", 20), replica("c", 9000)]
    assert preferred(router, replicas, pending(0)) == ["b"]
    ranks = asyncio.run(router.choose_replicas(replicas, pending(1)))
    assert len(ranks) == 2, "if the first does not answer there are others"
    assert len(ranks[1]) == 2


def test_what_was_sent_counts_until_it_ends(router: QueuedTokensRouter) -> None:
    replicas = [replica("a", 0), replica("b", 0)]
    (first,) = preferred(router, replicas, pending(0, prompt_tokens=4000))
    others = Counter(preferred(router, replicas, pending(i))[0] for i in range(1, 11))
    assert others[first] == 0
    router.on_request_completed("anything", "0")  # type: ignore[arg-type]
    assert preferred(router, replicas, pending(11)) == [first]


def test_without_any_report_it_is_two_at_random(router: QueuedTokensRouter) -> None:
    replicas = [replica(name, None) for name in "abc"]
    drawn = Counter(name for i in range(60) for name in preferred(router, replicas, pending(i)))
    assert set(drawn) == {"a", "b", "c"}
    assert sum(drawn.values()) == 120


@pytest.mark.parametrize("request_", [pending(0), None], ids=["request", "probe"])
def test_who_does_not_report_gets_nothing(router: QueuedTokensRouter, request_: Any) -> None:
    """It has no seat, or its step loop has failed and Serve has yet to replace it."""
    replicas = [replica("a", 5000), replica("seatless", None), replica("c", 7)]
    for _ in range(30):
        ranks = asyncio.run(router.choose_replicas(replicas, request_))
        assert {candidate.replica_id for rank in ranks for candidate in rank} == {"a", "c"}  # type: ignore[misc]


def test_one_replica_and_none(router: QueuedTokensRouter) -> None:
    assert preferred(router, [replica("a", None)], pending(0)) == ["a"]
    assert asyncio.run(router.choose_replicas([], pending(1))) == [[]]
