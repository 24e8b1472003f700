"""SIGTERM: nothing new is taken, running streams go on for the grace, the rest ends with an error event."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from .conftest import Cluster, running_cluster

pytestmark = pytest.mark.timeout(240)

SIZES = ("--kv-memory", "32MiB", "--max-seqs", "4", "--max-model-len", "4096", "--dtype", "float32", "--device", "cpu")


@dataclass
class Reader:
    """A client that reads a stream in a thread."""

    url: str
    tokens: int
    events: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    broken: Exception | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {"model": "small", "prompt": "hello", "max_tokens": self.tokens, "stream": True, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
                        if len(self.events) >= 5:
                            self.begun.set()
        except httpx.HTTPError as error:
            self.broken = error
        self.begun.set()

    def wait_for_tokens(self) -> None:
        """Return when the stream is under way."""
        assert self.begun.wait(60)
        assert self.broken is None
        assert len(self.events) >= 5, self.events

    def received(self) -> int:
        """Tokens that came."""
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return sum(len(choice.get("token_ids") or ()) for chunk in chunks for choice in chunk.get("choices", ()))


def config(folder: Path, grace_s: float) -> Path:
    path = folder / "divisi.toml"
    path.write_text(f"[limits]\nshutdown_grace_s = {grace_s}\n", encoding="utf-8")
    return path


@pytest.fixture
def long_grace(small_model: Path, tmp_path: Path) -> Iterator[Cluster]:
    arguments = ("--config", str(config(tmp_path, 60.0)), "--expert-shards", "1")
    with running_cluster(small_model, tmp_path / "log.txt", *arguments, *SIZES) as cluster:
        yield cluster


def tokens_lasting(cluster: Cluster, seconds: float) -> int:
    """How many tokens take so long, by a short answer's speed."""
    body = {"model": "small", "prompt": "hello", "max_tokens": 100, "ignore_eos": True}
    begin = time.monotonic()
    httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
    return max(int(seconds * 100 / (time.monotonic() - begin)), 50)


def test_a_running_stream_is_finished_whole_within_the_grace(long_grace: Cluster) -> None:
    count = min(tokens_lasting(long_grace, 6.0), 4000)
    reader = Reader(long_grace.url, count)
    reader.wait_for_tokens()
    long_grace.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert reader.thread.is_alive(), "the stream ended before the server could be asked anything"
    assert httpx.get(f"{long_grace.url}/v1/health/ready", timeout=10).status_code == 503
    refused = httpx.post(f"{long_grace.url}/v1/completions", json={"model": "small", "prompt": "a"}, timeout=10)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert "shutting down" in refused.json()["error"]["message"]
    reader.thread.join(90)
    assert reader.broken is None
    assert reader.events[-1] == "[DONE]"
    assert reader.received() == count
    assert long_grace.process.wait(30) == 0


@pytest.mark.parametrize("second_signal", [False, True])
def test_a_stream_that_outlasts_the_grace_ends_with_an_error_event(
    small_model: Path, tmp_path: Path, second_signal: bool
) -> None:
    arguments = ("--config", str(config(tmp_path, 60.0 if second_signal else 1.5)))
    with running_cluster(small_model, tmp_path / "log.txt", *arguments, *SIZES) as cluster:
        reader = Reader(cluster.url, 4000)
        reader.wait_for_tokens()
        begin = time.monotonic()
        cluster.process.send_signal(signal.SIGTERM)
        if second_signal:
            time.sleep(0.5)
            cluster.process.send_signal(signal.SIGTERM)
        reader.thread.join(30)
        assert reader.broken is None, "the connection was cut"
        error = json.loads(reader.events[-1])["error"]
        assert error["code"] == "shutting_down"
        assert 0 < reader.received() < 4000
        assert cluster.process.wait(30) == 0
        assert time.monotonic() - begin < 25
