"""What open streams see of a death: each kind three times, two attention workers, two shards, two ingresses.

Texts are compared with undisturbed ones in fp32. A gap is the longest pause of any of the streams.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.open_streams import OpenStreams, hurt_in_the_middle
from tests.support.rounds import rounds

from .conftest import Cluster, running_cluster
from .test_serve_split import metric, wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

MODEL, TOKENS, STREAMS = "divisi-demo", 200, 4
CALM_S = 3.0
SIZES = ("--dtype", "float32", "--device", "cpu", "--kv-memory", "64MiB", "--max-seqs", "8", "--max-model-len", "2048")
SHAPE = ("--attention-workers", "2", "--expert-shards", "2", "--ingress-replicas", "2", "--mtp-max-draft-tokens", "0")
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with running_cluster(checkpoint_dir(), log, *SHAPE, *SIZES, ready_within_s=180.0) as cluster:
        wait_for(lambda: metric(cluster, "seats_filled") == [4.0], 60, "not everybody is there")
        yield cluster


@pytest.fixture(scope="module")
def texts(gang: Cluster) -> list[str]:
    """Of undisturbed streams."""
    streams = OpenStreams(gang.url, MODEL, STREAMS, TOKENS)
    streams.join(180)
    assert streams.problems == []
    return streams.texts


@pytest.fixture
def spares() -> int:
    """That are there while nobody is missing."""
    return 1


@pytest.fixture
def measure(
    gang: Cluster, texts: list[str], spares: int, record_result: Record
) -> Callable[[str, Callable[[], None]], float]:
    """Strike, some times; returns the median of the gaps."""

    def measure(what: str, blow: Callable[[], None]) -> float:
        gaps: list[float] = []
        loads = []
        for _ in rounds(gaps):
            settle(gang, spares)
            loads.append(round(os.getloadavg()[0], 1))
            gaps.append(round(hurt_in_the_middle(gang.url, MODEL, TOKENS, texts, blow), 2))
        median = statistics.median(gaps)
        record_result(f"{what}: median gap in seconds", median)
        record_result(f"{what}: gaps", gaps)
        record_result(f"{what}: load average before", loads)
        return median

    return measure


def settle(gang: Cluster, spares: int = 1) -> None:
    """Until everybody is back, and nothing has changed for a while: the seat of a dead worker counts for a moment."""
    gang.wait_until_ready(60)
    since, until, seen = time.monotonic(), time.monotonic() + 90, None
    while time.monotonic() - since < CALM_S:
        now = metric(gang, "epoch"), len(gang.spares()), len(gang.processes("ServeReplica:divisi:Gang"))
        whole = metric(gang, "seats_filled") == [4.0] and len(gang.processes("ServeReplica:divisi:Ingress")) == 2
        if now != seen or not whole or now[1:] != (spares, 1):
            since, seen = time.monotonic(), now
        assert time.monotonic() < until, f"somebody is missing: epoch, spares, owners {now}, all seats {whole}"
        time.sleep(0.2)


def of(gang: Cluster, title: str) -> list[psutil.Process]:
    """A kind's processes that serve."""
    return gang.shards() if title == "ExpertShardActor" else gang.processes(title)


def kill(gang: Cluster, title: str) -> Callable[[], None]:
    """The blow: SIGKILL for the first of a kind."""

    def blow() -> None:
        os.kill(of(gang, title)[0].pid, signal.SIGKILL)

    return blow


def test_a_shard_is_killed(gang: Cluster, measure: Callable[[str, Callable[[], None]], float]) -> None:
    assert measure("shard killed", kill(gang, "ExpertShardActor")) <= 2.0


def test_one_of_two_workers_is_killed(gang: Cluster, measure: Callable[[str, Callable[[], None]], float]) -> None:
    assert measure("worker killed", kill(gang, "AttentionWorker")) <= 1.0


def test_the_coordinator_is_killed(gang: Cluster, measure: Callable[[str, Callable[[], None]], float]) -> None:
    settle(gang)
    before = metric(gang, "epoch"), metric(gang, "aborted_steps_total")
    assert measure("coordinator killed", kill(gang, "CoordinatorActor")) <= 0.5
    wait_for(
        lambda: (metric(gang, "epoch"), metric(gang, "aborted_steps_total")) == before, 30,
        f"the epoch was not adopted, or a step was aborted: {before}",
    )  # fmt: skip


def test_the_owner_of_the_gang_is_killed(gang: Cluster, measure: Callable[[str, Callable[[], None]], float]) -> None:
    owned = [*gang.shards(), *gang.processes("CoordinatorActor")]
    assert measure("owner of the gang killed", kill(gang, "ServeReplica:divisi:Gang")) <= 0.5
    assert all(process.is_running() for process in owned), "it has taken others with it"


def test_one_of_two_ingresses_is_killed(gang: Cluster, texts: list[str], record_result: Record) -> None:
    """Its own streams break; HTTP can do no other."""
    streams = OpenStreams(gang.url, MODEL, 2 * STREAMS, TOKENS)
    streams.wait_until_flowing(5)
    victim = gang.processes("ServeReplica:divisi:Ingress")[0]
    fronts = {process.pid for process in gang.processes() if process.name() == "haproxy"}
    theirs = {link.laddr for pid in fronts for link in psutil.Process(pid).net_connections() if link.raddr}
    own = [link for link in victim.net_connections() if link.raddr in theirs and link.status == psutil.CONN_ESTABLISHED]
    victim.kill()
    streams.join(120)
    broken = [stream for stream in streams.all if stream.problem]
    whole = [stream for stream in streams.all if not stream.problem]
    record_result("ingress killed: streams broken of 8", len(broken))
    assert 0 < len(broken) < len(streams.all)
    assert len(broken) <= len(own), "more than it had"
    for stream, text in zip(streams.all, texts, strict=False):
        assert stream.text == text if stream in whole else text.startswith(stream.text)


def stop_for(process: psutil.Process, seconds: float) -> None:
    process.suspend()
    time.sleep(seconds)
    process.resume()


@pytest.mark.parametrize("title", ["ExpertShardActor", "AttentionWorker", "CoordinatorActor"])
def test_who_stands_still_for_a_second_goes_on(
    gang: Cluster, measure: Callable[[str, Callable[[], None]], float], title: str
) -> None:
    stopped = of(gang, title)[0]
    assert measure(f"{title} stopped for 1 s", lambda: stop_for(of(gang, title)[0], 1.0)) <= 2.0
    assert stopped.is_running()


@pytest.mark.parametrize("title", ["ExpertShardActor", "AttentionWorker"])
def test_who_hangs_for_good_is_killed(
    gang: Cluster, measure: Callable[[str, Callable[[], None]], float], title: str
) -> None:
    hung: list[psutil.Process] = []

    def blow() -> None:
        hung.append(of(gang, title)[0])
        hung[-1].suspend()

    assert measure(f"{title} stopped for good", blow) <= 10.0
    wait_for(lambda: not any(process.is_running() for process in hung), 10, "it hangs still")


def test_both_shards_die_and_the_coordinator_hangs_before_both_are_replaced(
    gang: Cluster, measure: Callable[[str, Callable[[], None]], float]
) -> None:
    def blow() -> None:
        for shard in of(gang, "ExpertShardActor"):
            shard.kill()
        time.sleep(2.0)  # the spare serves by then, and no process that Ray has started in the place of a shard
        of(gang, "CoordinatorActor")[0].suspend()

    assert measure("both shards killed, the coordinator stopped for good 2 s later", blow) <= 10.0


def test_the_front_comes_back(gang: Cluster, record_result: Record) -> None:
    """HAProxy and what manages it, both at once: new requests are served after so long."""
    outages: list[float] = []
    for _ in rounds(outages):
        settle(gang)
        victims = [process for process in gang.processes() if process.name() == "haproxy"]
        victims += gang.processes("HAProxyManager")
        begin = time.monotonic()
        for victim in victims:
            victim.kill()
        while not serves(gang):
            assert time.monotonic() - begin < 30
            time.sleep(0.05)
        outages.append(round(time.monotonic() - begin, 2))
    record_result("HAProxy and its manager killed: seconds until served, median", statistics.median(outages))
    record_result("HAProxy and its manager killed: each", outages)
    assert statistics.median(outages) <= 5.0


def serves(gang: Cluster) -> bool:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
    try:
        return httpx.post(f"{gang.url}/v1/completions", json=body, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_a_request_that_comes_into_the_gap_waits(gang: Cluster, record_result: Record, tmp_path: Path) -> None:
    """Or hears when to come again: never a bare failure."""
    settle(gang)
    kill(gang, "ExpertShardActor")()
    replies = []
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
        replies.append(httpx.post(f"{gang.url}/v1/completions", json=body, timeout=30))
        time.sleep(0.1)
    record_result("requests into the gap of a killed shard: status codes", sorted({r.status_code for r in replies}))
    assert {reply.status_code for reply in replies} <= {200, 503}
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 503)
    assert replies[-1].status_code == 200
