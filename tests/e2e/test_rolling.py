"""`serve deploy` of a changed config under eight streams: some of it changes live, the rest is refused."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.ports import free_port

from .test_streams import Answer, body, clients, read

pytestmark = [pytest.mark.verify, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
TOKENS = 500
_READY_S = 200.0


@dataclass
class Deployment:
    """A cluster of one node, and what `serve deploy` makes of a config there."""

    folder: Path
    environment: dict[str, str]
    dashboard: int
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, model: Path, user_config: dict[str, Any] | None = None, **cache: int) -> None:
        args = {
            "model": {"model_dir": str(model), "dtype": "float32"},
            "gang": {"attention_workers": 2, "expert_shards": 1, "device": "cpu", "threads_per_process": 1},
            "cache": {"kv_memory": "32MiB", "max_seqs": 8} | cache,
            "http": {"port": self.port},
            "log": {"file": str(self.log)},
        }
        deployments = [{"name": name, "user_config": user_config} for name in ("Ingress", "AttentionWorker", "Gang")]
        application = {
            "name": "divisi",
            "route_prefix": "/",
            "import_path": "divisi.deploy.serve_app:build",
            "args": args,
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [application | ({"deployments": deployments} if user_config else {})],
        }
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [str(BIN / "serve"), "deploy", "--address", f"http://127.0.0.1:{self.dashboard}", str(file)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def status(self) -> dict[str, Any]:
        """Of the application, as Serve tells it."""
        reply = httpx.get(f"http://127.0.0.1:{self.dashboard}/api/serve/applications/", timeout=20)
        found: dict[str, Any] = reply.json()["applications"]["divisi"]
        return found

    def epoch(self) -> float:
        found = re.search(r"^divisi_epoch (\S+)$", httpx.get(f"{self.url}/metrics", timeout=10).text, re.MULTILINE)
        assert found is not None
        return float(found[1])


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a short path, for the sockets
    port, dashboard = free_port(), free_port()
    environment = os.environ | {"TMPDIR": str(folder), "XDG_STATE_HOME": str(folder)}
    environment |= {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
    head = [BIN / "ray", "start", "--head", "--block", "--port", str(port), "--num-cpus", "8", "--disable-usage-stats",
            "--include-dashboard", "true", "--dashboard-port", str(dashboard)]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(head, env=environment, stdout=log, stderr=log)
    try:
        _until(lambda: httpx.get(f"http://127.0.0.1:{dashboard}/api/serve/applications/").status_code == 200)
        yield Deployment(folder, environment, dashboard, free_port(), folder / "requests.log")
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _until(holds: Any, within_s: float = _READY_S) -> None:
    until = time.monotonic() + within_s
    while True:
        with suppress(httpx.TransportError, KeyError, ValueError):  # it is not there yet
            if holds():
                return
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.2)


async def streams(url: str, between: Any) -> list[Answer]:
    """Eight, beside which something happens, in a thread."""
    answers = [Answer() for _ in range(8)]
    async with clients(url) as http, asyncio.TaskGroup() as group:
        for number, answer in enumerate(answers):
            group.create_task(read(http, number, TOKENS, answer))
        async with asyncio.timeout(60):
            while not all(len(answer.tokens) >= 5 for answer in answers):
                await asyncio.sleep(0.01)
        await asyncio.to_thread(between)
        assert all(len(answer.tokens) < TOKENS for answer in answers), "too late to show anything"
    return answers


def test_some_of_it_changes_live_and_the_rest_is_refused(deployment: Deployment, small_model: Path) -> None:
    deployment.deploy(small_model, page_size=16)
    _until(lambda: httpx.get(f"{deployment.url}/v1/health/ready", timeout=5).status_code == 200)
    _until(lambda: deployment.status()["status"] == "RUNNING")
    alone = asyncio.run(streams(deployment.url, lambda: None))
    epoch = deployment.epoch()
    live = {"log": {"level": "debug"}, "limits": {"max_queued_requests": 8}, "gang": {"min_attention_workers": 2}}

    def refused_at_nine() -> bool:
        return httpx.post(f"{deployment.url}/v1/completions", json=body(0, 1), timeout=20).status_code == 429

    def change_live() -> None:
        assert not refused_at_nine()
        deployment.deploy(small_model, live, page_size=16)
        _until(refused_at_nine, 20)

    answers = asyncio.run(streams(deployment.url, change_live))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    httpx.get(f"{deployment.url}/v1/health/ready", timeout=10)
    lines = [json.loads(line) for line in deployment.log.read_text().splitlines()]
    assert [line for line in lines if line["level"] == "debug" and line["process"].startswith("ingress")]
    assert deployment.epoch() == epoch

    def change_pages() -> None:
        deployment.deploy(small_model, live, page_size=32)
        _until(lambda: deployment.status()["status"] == "DEPLOY_FAILED", 30)

    answers = asyncio.run(streams(deployment.url, change_pages))
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    assert "cache.page_size is 16 and cannot become 32 while the gang serves" in deployment.status()["message"]
    assert deployment.epoch() == epoch
    assert httpx.post(f"{deployment.url}/v1/completions", json=body(0, 1), timeout=20).status_code == 200
