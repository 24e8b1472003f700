"""Tokens through everything but a model: real actors, ingress and front around steps that do nothing.

Each of 64 streams gets one token a step, and has to show one event a token. The server and the load generator share the
machine.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from divisi.benchmarks.http_cost.load import LoadGenerator, Taken
from divisi.benchmarks.http_cost.noop_worker import TOKENS
from divisi.benchmarks.http_cost.report import STREAMS, unchunked
from divisi.benchmarks.http_cost.servers import MODEL, PATH

_READY_S = 120.0
_STEP_MS = 4.0
_PROCESSES = {"worker": "AttentionWorker", "ingress": "Ingress", "front": "haproxy|ProxyActor"}


def report(model_dir: Path, rounds: int, tokens: int) -> str:
    """A table with a row for each round, the first being a warm-up. Exits where an event is missing."""
    lines = [
        "| tokens/s | " + " | ".join(f"{name}, ms/token" for name in _PROCESSES) + " | load generator, ms/token |",
        "|---" * (len(_PROCESSES) + 2) + "|",
    ]
    speeds = []
    with _server(model_dir) as port, LoadGenerator(None) as load:
        for turn in range(rounds + 1):
            before = _cpu_seconds()
            taken = load.take(port, PATH, _body(tokens), STREAMS)
            after = _cpu_seconds()
            _check(taken, tokens)
            total = STREAMS * tokens
            costs = [f"{1e3 * (after[name] - before[name]) / total:.3f}" for name in _PROCESSES]
            if turn:
                speeds.append(total / taken.seconds)
                generator = f"{1e3 * taken.cpu_seconds / total:.3f}"
                lines.append(f"| {speeds[-1]:,.0f} | {' | '.join(costs)} | {generator} |")
    most = STREAMS / (_STEP_MS / 1e3)
    told = f"{STREAMS} streams of {tokens} tokens, a step every {_STEP_MS:g} ms ({most:,.0f} tokens/s at most)"
    return f"{told}, median {statistics.median(speeds):,.0f} tokens/s\n\n" + "\n".join(lines)


def _body(tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": "Say something."}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "stream": True, "ignore_eos": True}


def _check(taken: Taken, tokens: int) -> None:
    """Every token is an event of its own, in order."""
    lines = unchunked(taken.first).decode().splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    found = [text for chunk in chunks if (text := chunk["choices"][0]["delta"].get("content"))]
    wanted = [TOKENS[number % len(TOKENS)].decode() for number in range(tokens)]
    if found != wanted or not taken.same:
        raise SystemExit(f"wrong answer: {len(found)} events for {tokens} tokens, streams alike: {taken.same}")


def _cpu_seconds() -> dict[str, float]:
    """Of each kind of process, all of its kind on this machine."""
    found = dict.fromkeys(_PROCESSES, 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title, times = " ".join(process.info["cmdline"] or ()), process.info["cpu_times"]
        for name, parts in _PROCESSES.items():
            if times is not None and any(part in title for part in parts.split("|")):
                found[name] += times.user + times.system
    return found


@contextmanager
def _server(model_dir: Path) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    sizes: Sequence[object] = (
        "--max-seqs",
        STREAMS,
        "--max-queued-requests",
        4 * STREAMS,
        "--served-model-name",
        MODEL,
    )
    command = [sys.executable, "-m", "divisi.benchmarks.http_cost.noop_worker", _STEP_MS, "serve", model_dir]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(word) for word in (*command, "--port", port, *sizes)],
            stdout=log, stderr=log, env=os.environ | {"RAY_ADDRESS": ""},
        )  # fmt: skip
        try:
            until = time.monotonic() + _READY_S
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read().decode()}")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def _ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v1/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
