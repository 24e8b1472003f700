"""Which worker gets a request: estimates from reports and requests sent since, and the balance that comes of it."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from divisi.deploy.routing import TOKENS_PER_REQUEST, QueuedTokens, WorkerReport

REPORT_EVERY_S = 0.5
"""Twice what a worker takes."""

Choose = Callable[[dict[int, WorkerReport], str, int], int]


def report(queued: int = 0, unfinished: int = 0, at: float = 0.0) -> WorkerReport:
    return WorkerReport(at, queued, unfinished)


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queues(clock: Clock) -> QueuedTokens[str]:
    return QueuedTokens(clock=clock, rng=random.Random(1))


def test_the_worker_with_fewer_queued_tokens_gets_the_request(queues: QueuedTokens[str]) -> None:
    assert queues.choose({"a": report(5000, 1), "b": report(100, 3), "c": report(900, 2)}, "r", 10) == "b"


def test_a_worker_full_of_decodes_is_not_idle(queues: QueuedTokens[str]) -> None:
    assert queues.choose({"a": report(0, 20), "b": report(300, 1)}, "r", 10) == "b"


def test_a_burst_between_two_reports_is_spread_by_tokens(queues: QueuedTokens[str]) -> None:
    reports = {"a": report(), "b": report()}
    first = queues.choose(reports, "long", 4000)
    others = [queues.choose(reports, f"short{i}", 50) for i in range(20)]
    assert set(others) == {"a", "b"} - {first}


def test_what_a_report_has_seen_is_not_counted_twice(queues: QueuedTokens[str], clock: Clock) -> None:
    worker = queues.choose({"a": report(), "b": report()}, "r", 1000)
    fresh = {"a": report(at=clock.now), "b": report(at=clock.now)}
    assert queues.loads(fresh)[worker] == 1000 + TOKENS_PER_REQUEST, "it may still be on its way"
    clock.now += 1
    seen = fresh | {worker: report(900, 1, at=clock.now)}
    assert queues.loads(seen)[worker] == 900 + TOKENS_PER_REQUEST


def test_a_finished_request_and_a_lost_worker_are_forgotten(queues: QueuedTokens[str]) -> None:
    reports = {"a": report(), "b": report()}
    lost = queues.choose(reports, "r1", 1000)
    queues.choose(reports, "r2", 1000)
    queues.finished("r2")
    queues.finished("unknown")
    (left,) = {"a", "b"} - {lost}
    assert queues.loads({left: report()}) == {left: 0}
    assert queues.loads(reports) == {"a": 0, "b": 0}


def test_a_request_that_is_routed_again_counts_once(queues: QueuedTokens[str]) -> None:
    reports = {"a": report(), "b": report()}
    queues.choose(reports, "r", 1000)
    queues.choose(reports, "r", 1000)
    assert sum(queues.loads(reports).values()) == 1000 + TOKENS_PER_REQUEST


def test_a_worker_without_room_for_the_prompt_is_passed_over(queues: QueuedTokens[str]) -> None:
    full = WorkerReport(0.0, 0, 0, free_tokens=99)
    assert queues.choose({"full": full, "busy": report(5000, 3)}, "r", 100) == "busy"
    assert queues.choose({"full": full, "full too": full}, "r", 100) in ("full", "full too")


@dataclass
class Cluster:
    """Workers that compute tokens one after another, and reports of them that are up to a period old."""

    workers: int
    tokens_per_s: float = 2000.0
    now: float = 0.0
    reports: dict[int, WorkerReport] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    ends: list[list[tuple[float, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends = [[] for _ in range(self.workers)]
        self._report_at = 0.0

    def clock(self) -> float:
        return self.now

    def advance(self, to: float) -> None:
        self.now = to
        self.ends = [[end for end in ends if end[0] > to] for ends in self.ends]
        if to >= self._report_at:
            self._report_at = to + REPORT_EVERY_S
            self.reports = {
                worker: report(sum(tokens for _, tokens in ends), len(ends), to)
                for worker, ends in enumerate(self.ends)
            }

    def serve(self, worker: int, tokens: int) -> float:
        """Queue a request at a worker; when it ends."""
        ends = self.ends[worker]
        start = ends[-1][0] if ends else self.now
        self.waits.append(start - self.now)
        ends.append((start + (tokens + TOKENS_PER_REQUEST) / self.tokens_per_s, tokens))
        return ends[-1][0]


def p95_wait(workers: int, ingresses: int, policy: str, seed: int, requests: int = 3000) -> float:
    """Seconds until a request's turn, at 80 % load, when one prompt in ten has 8,000 tokens and the others 50."""
    rng, draws = random.Random(seed), random.Random(seed + 1)
    cluster = Cluster(workers)
    routers = [QueuedTokens[int](ingresses == 1, cluster.clock, random.Random(seed + 10 + i)) for i in range(ingresses)]
    open_requests: list[tuple[float, str, int]] = []
    mean_tokens = 0.1 * 8000 + 0.9 * 50 + TOKENS_PER_REQUEST
    for number in range(requests):
        cluster.advance(cluster.now + rng.expovariate(0.8 * workers * cluster.tokens_per_s / mean_tokens))
        while open_requests and open_requests[0][0] <= cluster.now:
            _, ended, ingress = heapq.heappop(open_requests)
            routers[ingress].finished(ended)
        tokens, ingress, name = (8000 if rng.random() < 0.1 else 50), rng.randrange(ingresses), str(number)
        if policy == "queued tokens":
            worker = routers[ingress].choose(cluster.reports, name, tokens)
        else:  # of two at random the one with fewer open requests, which everybody knows without delay
            worker = min(draws.sample(range(workers), 2), key=lambda w: len(cluster.ends[w]))
        heapq.heappush(open_requests, (cluster.serve(worker, tokens), name, ingress))
    return sorted(cluster.waits)[int(0.95 * requests)]


@pytest.mark.parametrize(("workers", "ingresses"), [(2, 1), (4, 1), (4, 4), (8, 8)])
def test_mixed_prompts_wait_less_than_with_power_of_two_choices(
    workers: int, ingresses: int, record_result: Callable[[str, object], None]
) -> None:
    seeds = range(4)
    ours = sum(p95_wait(workers, ingresses, "queued tokens", seed) for seed in seeds) / len(seeds)
    theirs = sum(p95_wait(workers, ingresses, "open requests", seed) for seed in seeds) / len(seeds)
    record_result("p95 seconds of waiting, simulated: queued tokens / open requests", f"{ours:.1f} / {theirs:.1f}")
    assert ours < 0.95 * theirs
