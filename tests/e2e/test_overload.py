"""Ten times the sustainable rate: 200 or 429 with a computed Retry-After, bounded latency, and nothing held afterwards.

*Sustainable* is the rate of as many clients as the server runs at once, each sending its next request when the last is
answered. *Unloaded* is an open loop (Poisson arrivals) at 70 % of that. The overload is the same open loop at 1000 %.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import pytest

from .conftest import Cluster, running_cluster
from .test_serve_split import metric, wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

SEED = 11
MAX_SEQS = 8
OVERLOAD_S = 60.0
NORMAL_S = 20.0
TOKENS = 96
ZERO = ("requests_running", "requests_waiting", "queued_tokens", "admitted_requests", "admitted_queued_tokens")
FREE = (("kv_pages_free", "kv_pages"), ("state_slots_free", "state_slots"))


@dataclass
class Load:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    """Retry-After of each 429."""

    @property
    def p95(self) -> float:
        return quantiles(self.latencies, n=20)[-1]


async def ask(http: httpx.AsyncClient, load: Load, rng: random.Random) -> None:
    body = {"model": "small", "prompt": [rng.randrange(10, 1000) for _ in range(16)], "max_tokens": TOKENS,
            "ignore_eos": True}  # fmt: skip
    begin = time.monotonic()
    reply = await http.post("/v1/completions", json=body)
    load.statuses[reply.status_code] += 1
    if reply.status_code == 200:
        load.latencies.append(time.monotonic() - begin)
    elif reply.status_code == 429:
        load.waits.append(int(reply.headers["retry-after"]))


async def closed_loop(http: httpx.AsyncClient, clients: int, seconds: float) -> float:
    """Answers per second with so many clients."""
    load, rng, begin = Load(), random.Random(SEED), time.monotonic()

    async def client() -> None:
        while time.monotonic() - begin < seconds:
            await ask(http, load, rng)

    await asyncio.gather(*(client() for _ in range(clients)))
    assert set(load.statuses) == {200}
    return load.statuses[200] / (time.monotonic() - begin)


async def open_loop(http: httpx.AsyncClient, per_second: float, seconds: float) -> Load:
    load, rng = Load(), random.Random(SEED)
    at = begin = time.monotonic()
    async with asyncio.TaskGroup() as group:
        while (at := at + rng.expovariate(per_second)) < begin + seconds:
            await asyncio.sleep(at - time.monotonic())
            group.create_task(ask(http, load, rng))
    return load


@pytest.fixture
def server(small_model: Path, tmp_path: Path) -> Iterator[Cluster]:
    sizes = ("--kv-memory", "32MiB", "--max-seqs", str(MAX_SEQS), "--max-model-len", "1024", "--dtype", "float32")
    with running_cluster(small_model, tmp_path / "log.txt", "--device", "cpu", *sizes) as cluster:
        yield cluster


async def test_overload(server: Cluster, record_result: Callable[[str, object], None]) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        await closed_loop(http, MAX_SEQS, 3.0)
        capacity = await closed_loop(http, MAX_SEQS, 12.0)
        normal = await open_loop(http, 0.7 * capacity, NORMAL_S)
        over = await open_loop(http, 10 * capacity, OVERLOAD_S)
    numbers = {
        "capacity_per_s": round(capacity, 2),
        "unloaded": dict(normal.statuses), "unloaded_p95_s": round(normal.p95, 3),
        "overload": dict(over.statuses), "overload_p95_s": round(over.p95, 3),
        "retry_after_s": dict(sorted(Counter(over.waits).items())),
        "served_per_s": round(over.statuses[200] / OVERLOAD_S, 2),
    }  # fmt: skip
    record_result("overload", numbers)
    print(numbers, "seed", SEED)
    assert set(over.statuses) == {200, 429}
    assert over.p95 <= 2 * normal.p95
    assert over.statuses[200] >= 0.5 * capacity * OVERLOAD_S, "overload must not cost the throughput"
    held = {name: metric(server, name) for name in ZERO}
    await asyncio.to_thread(wait_for, lambda: all(not any(metric(server, name)) for name in ZERO), 10.0, f"{held}")
    for free, total in FREE:
        assert metric(server, free) == metric(server, total)
