"""Streams through two ingresses and two workers: one that stops reading, clients that come and go, a killed worker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from .conftest import Cluster, running_cluster
from .test_serve_split import metric, wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(300)]

SIZES = (
    "--max-queued-requests",
    "256",
    "--kv-memory",
    "64MiB",
    "--max-seqs",
    "32",
    "--max-model-len",
    "2048",
    "--dtype",
    "float32",
    "--device",
    "cpu",
)
HELD = ("kv_pages_free", "state_slots_free", "requests_running", "requests_waiting")
COUNTED = ("resumed_requests_total", "recomputed_tokens_total")
STOPS_FOR_S = 5.0


@pytest.fixture(scope="module")
def servers(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("streams")
    config = folder / "divisi.toml"
    config.write_text("[http]\ningress_replicas = 2\n")
    shape = ("--attention-workers", "2", "--expert-shards", "1")
    with running_cluster(small_model, folder / "log.txt", "--config", str(config), *shape, *SIZES) as cluster:
        # The gang serves with one of them, and the other comes a moment later.
        wait_for(lambda: len(metric(cluster, "requests_running")) == 2, 30, "the second worker is not there")
        yield cluster


def held(cluster: Cluster) -> list[list[float]]:
    return [metric(cluster, name) for name in HELD]


def of_ingresses(cluster: Cluster, name: str) -> list[float]:
    """What each of the two ingresses counts; a scrape meets either."""
    found: dict[str, float] = {}

    def both() -> bool:
        page = httpx.get(f"{cluster.url}/metrics", timeout=10).text
        rows = re.findall(rf'^divisi_{name}{{ingress="([^"]*)"}} (\S+)$', page, re.MULTILINE)
        found.update((ingress, float(value)) for ingress, value in rows)
        return len(found) == 2

    wait_for(both, 20, "an ingress was never met")
    return list(found.values())


def body(number: int, tokens: int) -> dict[str, Any]:
    return {"model": "small", "prompt": [number + 10, 7, 8], "max_tokens": tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip


@dataclass
class Answer:
    """What one client read."""

    tokens: list[int] = field(default_factory=list)
    events: int = 0
    error: str = ""
    times: list[float] = field(default_factory=list)
    """When its events came."""

    def take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        data = json.loads(line[6:])
        if "error" in data:
            self.error = data["error"]["message"]
        for choice in data.get("choices", ()):
            found = choice.get("token_ids") or []
            self.tokens += found
            self.events += bool(found)
            self.times.append(time.monotonic())


async def read(http: httpx.AsyncClient, number: int, tokens: int, answer: Answer | None = None) -> Answer:
    answer = answer or Answer()
    async with http.stream("POST", "/v1/completions", json=body(number, tokens)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            answer.take(line)
    return answer


async def read_with_a_stop(url: str, number: int, tokens: int) -> Answer:
    """Over a socket that holds next to nothing, so that what is not read waits in the server."""
    content, target = json.dumps(body(number, tokens)).encode(), httpx.URL(url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((target.host, target.port))
        connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
        head = (
            f"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        writer.write(head.encode() + content)
        data = await reader.read(512)
        await asyncio.sleep(STOPS_FOR_S)
        while piece := await reader.read(4096):
            data += piece
        writer.close()
    answer = Answer()
    for line in data.decode().splitlines():
        answer.take(line)
    return answer


def clients(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))


async def test_one_that_stops_reading_loses_nothing_and_holds_up_nobody(
    servers: Cluster, record_result: Callable[[str, object], None]
) -> None:
    tokens, others = 300, 63
    async with clients(servers.url) as http:
        stopped = asyncio.create_task(read_with_a_stop(servers.url, 0, tokens))
        answers = await asyncio.gather(*(read(http, number % 8, tokens) for number in range(others)))
        answers.append(await stopped)
        alone = [(await read(http, number, tokens)).tokens for number in range(8)]
    for number, answer in enumerate([*answers[:others], answers[-1]]):
        which = 0 if number == others else number % 8
        assert (answer.events, answer.error) == (tokens, ""), f"stream {number}: one event a token"
        assert answer.tokens == alone[which], f"stream {number}"
    record_result("streams whole and in order, one of which stopped for 5 s", len(answers))


def own(servers: Cluster, title: str) -> list[tuple[int, int, int]]:
    """Open files and threads of the processes of that title."""
    return sorted((p.pid, p.num_fds(), p.num_threads()) for p in servers.processes(title))


async def test_200_clients_that_leave_hold_nothing(servers: Cluster) -> None:
    async with clients(servers.url) as http:
        await asyncio.gather(
            *(read(http, number, 5) for number in range(32))
        )  # pools of threads are as large as they get
    wait_for(lambda: metric(servers, "requests_running") == [0.0, 0.0], 10, "something still runs")
    before, held_before = own(servers, "ServeReplica"), held(servers)

    async def leave(http: httpx.AsyncClient, number: int) -> None:
        async with http.stream("POST", "/v1/completions", json=body(number % 8, 400)) as response:
            if number % 2 and response.status_code == 200:
                await anext(response.aiter_lines())

    for start in range(0, 200, 25):
        async with clients(servers.url) as http:
            await asyncio.gather(*(leave(http, start + number) for number in range(25)))

    wait_for(lambda: held(servers) == held_before, 20, f"held: {held(servers)}, before: {held_before}")
    few = 4  # connections that are kept alive, and one that was just accepted
    wait_for(
        lambda: all(now[1] <= then[1] + few for now, then in zip(own(servers, "ServeReplica"), before, strict=True)),
        20, f"{own(servers, 'ServeReplica')}, before: {before}",
    )  # fmt: skip


async def test_the_streams_of_a_killed_worker_go_on(
    servers: Cluster, record_result: Callable[[str, object], None]
) -> None:
    answers = [Answer() for _ in range(16)]
    async with clients(servers.url) as http:
        alone = await asyncio.gather(*(read(http, number, 600) for number in range(16)))
        resumed, recomputed = (-sum(of_ingresses(servers, name)) for name in COUNTED)
        reading = [asyncio.create_task(read(http, number, 600, answer)) for number, answer in enumerate(answers)]
        async with asyncio.timeout(60):
            while not all(len(answer.tokens) >= 5 for answer in answers):
                await asyncio.sleep(0.01)
        running = metric(servers, "requests_running")
        victim: psutil.Process = servers.processes("AttentionWorker")[0]
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.gather(*reading)
        assert [answer.error for answer in answers] == [""] * 16
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone], "nothing missing or twice"
        gaps = [max(later - earlier for earlier, later in pairwise(answer.times)) for answer in answers]
        record_result("longest pause of 16 streams on two workers, one killed, in seconds", round(max(gaps), 2))
        record_result("shortest of the longest pauses of these", round(min(gaps), 2))
        assert max(gaps) < 3.0, "nobody waits for the next worker"
        resumed += sum(of_ingresses(servers, COUNTED[0]))
        recomputed += sum(of_ingresses(servers, COUNTED[1]))
        record_result("answers that went on with another worker", resumed)
        assert 0 < resumed < 16, f"both workers had some: {running}; pauses {gaps}"
        assert recomputed >= 8 * resumed
