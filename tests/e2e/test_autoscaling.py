"""Attention workers follow the queue: a second one comes under load and goes after it, and streams go on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest

from divisi.deploy.cli.remote import RemoteError
from divisi.deploy.cli.top.snapshot import Snapshot, read
from divisi.deploy.routing import TOKENS_PER_REQUEST
from divisi.model.demo import checkpoint_dir
from tests.support.open_streams import OpenStream

from .conftest import running_cluster
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(300)]

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
PROBE_S, LOAD_S = 6, 45
TIMES = 2.2
"""As many requests a second as two users at once get answered: too many for one worker, not for two."""
SERVES_S, GONE_S, PAUSE_S = 15.0, 20.0, 0.5


class Watch:
    """What the server tells of itself, four times a second."""

    def __init__(self, url: str) -> None:
        self._url, self._ends = url, threading.Event()
        self.seen: list[Snapshot] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self._ends.wait(0.25):
                with suppress(RemoteError):
                    self.seen.append(read(client, self._url))

    def close(self) -> None:
        self._ends.set()
        self._thread.join(20)

    def workers(self) -> int:
        """That serve now."""
        return serving(self.seen[-1]) if self.seen else 0

    def first(self, condition: Callable[[Snapshot], bool], since: float = 0.0) -> float:
        """When it was first so; time is what `Snapshot.at` is in."""
        return next(seen.at for seen in self.seen if seen.at >= since and condition(seen))


def serving(seen: Snapshot) -> int:
    """Workers in the epoch that serves."""
    return len(seen.labels("requests_running", "worker"))


def waiting(seen: Snapshot) -> float:
    """Tokens, as the policy counts them."""
    unfinished = sum(seen.sum(name) or 0.0 for name in ("requests_running", "requests_waiting"))
    queued, turned_away = (seen.sum(name) or 0.0 for name in ("queued_tokens", "refused_tokens"))
    return queued + TOKENS_PER_REQUEST * unfinished + turned_away


def refused(records: list[dict[str, Any]], begin: float, end: float) -> float:
    """The part of what was sent in a span of the load that got a 429."""
    sent = [record["status"] == "rejected" for record in records if begin <= record["sent"] < end]
    return mean(sent) if sent else 0.0


def bench(url: str, folder: Path, *load: str) -> dict[str, Any]:
    """What `divisi bench` has measured."""
    report = folder / "bench.json"
    command = [sys.executable, "-m", "divisi.deploy.cli", "bench", "--base-url", f"{url}/v1", "--quiet", *load]
    command += ["--input-tokens", "32", "--output-tokens", "64", "--json", str(report), "--records"]
    subprocess.run(command, check=True, timeout=LOAD_S + 60, stdout=subprocess.DEVNULL)
    return dict(json.loads(report.read_text()))


def test_a_second_worker_comes_with_the_queue_and_goes_after_it(
    tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    (config := tmp_path / "divisi.toml").write_text(SETTINGS)
    with running_cluster(checkpoint_dir(), tmp_path / "log", "--config", str(config)) as cluster:
        watch = Watch(cluster.url)
        wait_for(lambda: watch.workers() == 1, 30, "not one worker")
        stream = OpenStream(cluster.url, "divisi-demo", "Tell me a story.", 8000)
        asked = bench(cluster.url, tmp_path, "--concurrency", "2", "--duration", str(PROBE_S))["records"]
        rate = TIMES * sum(each["status"] == "ok" for each in asked) / PROBE_S
        begun = time.monotonic()
        told = bench(cluster.url, tmp_path, "--rate", f"{rate:.2f}", "--duration", str(LOAD_S), "--warmup", "0")
        ended = time.monotonic()
        wait_for(lambda: watch.workers() == 1, 60, "the second worker stays")
        watch.close()
        times, problem = list(stream.times), stream.problem
    assert not problem
    broken = [each for each in told["records"] if each["status"] not in ("ok", "rejected")]
    assert not broken
    marked = watch.first(lambda seen: waiting(seen) > MARK, since=begun)
    two = watch.first(lambda seen: serving(seen) == 2)
    gone = watch.first(lambda seen: serving(seen) == 1, since=max(ended, two))
    pauses = [after - before for before, after in pairwise(times) if before > begun]
    changes = [max((b - a for a, b in pairwise(times) if abs(b - at) < 3), default=0.0) for at in (two, gone)]
    before, after = refused(told["records"], 0, two - begun), refused(told["records"], two - begun + 3, LOAD_S)
    record_result("seconds from the mark until the second serves", round(two - marked, 1))
    record_result("seconds from the load's end until it is gone", round(gone - ended, 1))
    record_result("a stream's longest pause at either epoch change, s", [round(pause, 2) for pause in changes])
    record_result("its longest pause at all, s", round(max(pauses), 2))
    record_result("refused before and after, %", [round(100 * before, 1), round(100 * after, 1)])
    assert two - marked <= SERVES_S
    assert gone - ended <= GONE_S
    assert after < before
    if max(changes) > PAUSE_S:
        pytest.xfail(f"a stream paused for {max(changes):.2f} s while a worker came, and {PAUSE_S} are wanted")
