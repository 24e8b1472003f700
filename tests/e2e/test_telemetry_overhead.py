"""What tracing every request costs: two servers, one with traces, take turns at 64 streams."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from divisi.model.demo import checkpoint_dir
from tests.e2e.conftest import running_cluster

pytestmark = [pytest.mark.verify, pytest.mark.timeout(480)]

STREAMS, TOKENS = 64, 96
MOST = 0.03
NAMES = ("without", "with")
SIZES = (
    "--kv-memory", "64MiB", "--max-seqs", "64", "--max-model-len", "512", "--device", "cpu",
    "--mtp-max-draft-tokens", "0",
)  # fmt: skip
SINK = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
    def log_message(self, *arguments): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def sink() -> Iterator[str]:
    """A collector that reads what it gets and forgets it, in a process of its own on the same cores."""
    process = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


CLIENT = """
import asyncio, sys, time, httpx
url, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
async def stream(client, number):
    body = {"model": "divisi-demo", "prompt": f"Town {number} is", "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0}
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for _ in reply.aiter_raw(): pass
async def main():
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(stream(client, number) for number in range(streams)))
        print(time.perf_counter() - begin)
asyncio.run(main())
"""


def burst(url: str) -> float:
    """Seconds for all streams."""
    command = [sys.executable, "-c", CLIENT, url, str(STREAMS), str(TOKENS)]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)


@contextmanager
def both(folder: Path, order: Sequence[str]) -> Iterator[dict[str, str]]:
    """URLs of a server with traces and one without, started in that order."""
    with ExitStack() as stack:
        endpoint = stack.enter_context(sink())
        urls = {}
        for name in order:
            own = folder / name
            own.mkdir(parents=True)
            more = ("--otlp-traces-endpoint", endpoint) if name == "with" else ()
            flags = (*SIZES, "--expert-shards", "1", *more)
            running = running_cluster(checkpoint_dir(), own / "log.txt", *flags, ready_within_s=180.0)
            urls[name] = stack.enter_context(running).url
        yield urls


def interval(ratios: Sequence[float], seed: int = 1) -> tuple[float, float, float]:
    """Median, and its 95 % interval by resampling."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def test_tracing_all_requests_costs_less_than_three_percent(
    tmp_path: Path, full_tier: bool, record_result: Callable[[str, object], None]
) -> None:
    ratios: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for order in (NAMES, NAMES[::-1]):  # the server that is started first may be faster, whatever it does
        with both(tmp_path / "-".join(order), order) as urls:
            for url in urls.values():
                burst(url)
            for pair in range(8 if full_tier else 1):
                took = {name: burst(urls[name]) for name in (NAMES if pair % 2 else NAMES[::-1])}
                ratios.append(took["with"] / took["without"])
                for name, seconds in took.items():
                    times[name].append(seconds)
    median, low, high = interval(ratios)
    record_result("seconds with traces over without: median, 95 % interval", [round(x, 4) for x in (median, low, high)])
    rates = {name: round(STREAMS * TOKENS / statistics.median(of)) for name, of in times.items()}
    record_result("tokens per second", rates)
    print(f"\noverhead {median - 1:+.2%} ({low - 1:+.2%} to {high - 1:+.2%}), tokens/s {rates}, at {time.ctime()}")
    assert median - 1 < MOST
