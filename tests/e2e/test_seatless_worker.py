"""Two replicas for one seat, as when Serve replaces one that is slow to end: nothing waits for the one without."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from .conftest import Cluster, running_cluster
from .test_serve_split import wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(240)]

# `divisi serve`, but Serve is told to run one attention worker more than there are seats, and says when they run.
ONE_MORE = """
import sys, threading, time
import ray
from ray import serve
from divisi.deploy import serve_app
from divisi.deploy.cli.main import main

class OneMore:
    def __init__(self, made):
        self.made = made

    def options(self, **options):
        return self.made.options(**options | {"num_replicas": options["num_replicas"] + 1})

def doubled(of, deployment=serve_app._deployment):
    return OneMore(deployment(of)) if of is serve_app.AttentionWorker else deployment(of)

def tell():
    running = 0
    while running < 2:
        time.sleep(0.2)
        if ray.is_initialized() and "divisi" in serve.status().applications:
            workers = serve.status().applications["divisi"].deployments.get("AttentionWorker")
            running = workers.replica_states.get("RUNNING", 0) if workers else 0
    print("both replicas run", flush=True)

serve_app._deployment = doubled
threading.Thread(target=tell, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def test_no_request_waits_for_a_worker_without_a_seat(small_model: Path, tmp_path: Path) -> None:
    sizes = ("--kv-memory", "32MiB", "--max-seqs", "16", "--max-model-len", "1024", "--device", "cpu")
    with running_cluster(small_model, tmp_path / "log.txt", *sizes, program=("-c", ONE_MORE)) as cluster:
        wait_for(lambda: "both replicas run" in cluster.log.read_text(), 60, "there is only one replica")
        with ThreadPoolExecutor(12) as clients:
            statuses = list(clients.map(lambda number: complete(cluster, number), range(12)))
    assert statuses == [200] * 12


def complete(cluster: Cluster, number: int) -> int:
    """Status of a short answer; 0 where none came within 20 s."""
    body = {"model": "small", "prompt": f"Once upon a time {number}", "max_tokens": 4}
    try:
        return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=20).status_code
    except httpx.TimeoutException:
        return 0
