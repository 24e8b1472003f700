"""Attention workers follow the queue: a second one comes under load and goes after it, and streams go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import pytest

from divisi.model.demo import checkpoint_dir
from tests.support.open_streams import StreamApart
from tests.support.scaling import ServerLog, Watch, bench, serving, waiting

from .conftest import Cluster, running_cluster
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(500)]

MARK = 288
"""Tokens that wait for each worker: three answers run, and one waits."""
SETTINGS = f"""
[gang]
expert_shards = 1
device = "cpu"
threads_per_process = 1
[gang.autoscaling]
min = 1
max = 2
queued_tokens_per_worker = {MARK}
upscale_delay_s = 1
downscale_delay_s = 5
[cache]
max_seqs = 3
[limits]
max_queued_requests = 6
"""
ROUNDS, PROBE_S, LOAD_S = 3, 6, 25
TIMES = 3
"""As many requests a second as two users at once get answered: too many for one worker, however fast the machine is
just then, and rather many for two, so that the second stays as long as the load does."""
SERVES_S, GONE_S, PAUSE_S = 15.0, 20.0, 0.5
WORKER = "AttentionWorker"


@dataclass(frozen=True)
class Round:
    """A load, and what came of it. All in seconds."""

    serves: float
    """From the mark until the second worker serves."""
    gone: float
    """From the load's end until it is gone."""
    pauses: list[float]
    """A stream's longest at each epoch change."""
    starting: float
    """Its longest while the second worker's process starts, on the same cores."""
    anywhere: float
    """Its longest at all."""
    refused: tuple[float, float]
    """The parts of what was sent that got a 429, before the second worker served and after."""
    parts: dict[str, float]


def run_round(cluster: Cluster, watch: Watch, folder: Path, rate: float) -> Round:
    """From one worker to two and back."""
    (first,) = cluster.processes(WORKER)
    stream = StreamApart(cluster.url, "divisi-demo", "Tell me a story.", 16000, folder / "stream.txt")
    begun = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        load = beside.submit(bench, cluster.url, folder, LOAD_S, "--rate", f"{rate:.2f}", "--warmup", "0")
        wait_for(lambda: watch.workers() == 2, LOAD_S, "no second worker")
        (second,) = (process for process in cluster.processes(WORKER) if process.pid != first.pid)
        told, ended = load.result()["records"], time.monotonic()
    wait_for(lambda: watch.workers() == 1 and alone(cluster, first), 60, "the second worker stays")
    times, problem = stream.close()
    assert not problem
    assert not [each for each in told if each["status"] not in ("ok", "rejected")]
    two, gone = watch.first(lambda seen: serving(seen) == 2, begun), watch.last(lambda seen: serving(seen) == 2)
    marked = watch.first(lambda seen: waiting(seen) > MARK, begun)
    log, gaps = ServerLog.read(folder / "divisi"), [gap for gap in pairwise(times) if gap[0] > begun]
    changes = log.changes(first, begun)
    assert len(changes) > 1, "it came, and it went"
    return Round(
        serves=two - marked,
        gone=gone - ended,
        pauses=[longest(gaps, *change) for change in changes],
        starting=longest(gaps, marked, changes[0][0]),
        anywhere=longest(gaps, begun, gone),
        refused=(refused(told, 0, two - begun), refused(told, two - begun + 3, LOAD_S)),
        parts=log.parts(second, marked),
    )


def longest(gaps: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Of those that have to do with a span of time."""
    return max(after - before for before, after in gaps if before <= end and after >= begin)


def alone(cluster: Cluster, first: psutil.Process) -> bool:
    """Whether no other worker's process is there, nor one that starts."""
    return [process.pid for process in cluster.processes(WORKER)] == [first.pid]


def refused(records: list[dict[str, Any]], begin: float, end: float) -> float:
    """The part of what was sent in a span of the load that got a 429."""
    sent = [record["status"] == "rejected" for record in records if begin <= record["sent"] < end]
    return mean(sent) if sent else 0.0


def test_a_second_worker_comes_with_the_queue_and_goes_after_it(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    (config := tmp_path / "divisi.toml").write_text(SETTINGS)
    with running_cluster(checkpoint_dir(), tmp_path / "log", "--config", str(config)) as cluster:
        watch = Watch(cluster.url)
        wait_for(lambda: watch.workers() == 1, 30, "not one worker")
        asked = bench(cluster.url, tmp_path, PROBE_S, "--concurrency", "2")["records"]
        rate = TIMES * sum(each["status"] == "ok" for each in asked) / PROBE_S
        rounds = [run_round(cluster, watch, tmp_path, rate) for _ in range(ROUNDS)]
        watch.close()
    record = {
        "seconds from the mark until the second serves": [round(each.serves, 1) for each in rounds],
        "seconds from the load's end until it is gone": [round(each.gone, 1) for each in rounds],
        "a stream's longest pause at each epoch change, s": [[round(p, 2) for p in each.pauses] for each in rounds],
        "its longest while the second worker starts, and at all, s": [
            [round(each.starting, 2), round(each.anywhere, 2)] for each in rounds
        ],
        "refused before and after, %": [[round(100 * part, 1) for part in each.refused] for each in rounds],
        "parts of its coming, medians, s": {
            part: round(median(each.parts[part] for each in rounds), 2) for part in rounds[0].parts
        },
    }
    for what, found in record.items():
        record_result(what, found)
    assert median(each.serves for each in rounds) <= SERVES_S
    assert median(each.gone for each in rounds) <= GONE_S
    assert max(max(each.pauses) for each in rounds) <= PAUSE_S
    assert mean(each.refused[1] for each in rounds) < mean(each.refused[0] for each in rounds)
