"""`divisi bench`: that it sends what it was told to, and that its numbers are what happened."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from divisi.cluster.errors import Overloaded
from divisi.deploy.cli import main
from divisi.deploy.cli.bench.load import Load, Schedule
from divisi.deploy.cli.bench.outcome import Distribution, Outcome, Summary, percentile
from divisi.deploy.cli.bench.workload import WORDS, Length
from tests.deploy.api.fake_engine import FakeEngine
from tests.deploy.cli.conftest import delta, end, sse


def bench(url: str, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["bench", "--base-url", f"{url}/v1", "--json", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_a_run_counts_what_the_server_served(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    engine.script = engine.say("word " * 40, group=3)
    flags = ("--concurrency", "3", "--requests", "12", "--input-tokens", "60", "--output-tokens", "8", "--records")
    status, report = bench(url, tmp_path / "run.json", *flags)
    assert status == 0
    assert report["counts"] == {"sent": 12, "ok": 12, "rejected": 0, "error": 0, "aborted": 0, "running": 0}
    probes_and_warmup, counted = engine.requests[:4], engine.requests[4:]
    assert [request.max_tokens for request in probes_and_warmup] == [1, 1, 8, 8]
    assert len(counted) == 12
    assert all(request.max_tokens == 8 and not request.stop_ids for request in counted)
    assert len({request.prompt for request in counted}) == 12
    # exactly what the engine was asked for and gave, whatever the events held
    assert report["input_tokens"] == sum(len(request.prompt) for request in counted)
    assert report["output_tokens"] == 12 * 8
    assert abs(report["input_tokens"] / 12 - 60) < 12
    assert report["output_tokens_per_second"] == pytest.approx(96 / report["seconds"])
    assert [record["status"] for record in report["records"]] == ["ok"] * 12
    assert report["finish_reasons"] == {"length": 12}


def test_refusals_and_failures_are_counted_apart(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    said = engine.say("word " * 40)
    count = iter(range(1000))

    def script(request: Any) -> Any:
        number = next(count)
        if number < 2:
            return said(request)  # the probes
        match number % 4:
            case 0:
                return [Overloaded("the queue is full", 2.0)]
            case 1:
                return [*said(request)[:3], RuntimeError("boom")]
            case _:
                return said(request)

    engine.script = script
    flags = ("--concurrency", "2", "--requests", "20", "--warmup", "0", "--output-tokens", "6")
    status, report = bench(url, tmp_path / "run.json", *flags)
    assert status == 1
    assert report["counts"] == {"sent": 20, "ok": 10, "rejected": 5, "error": 5, "aborted": 0, "running": 0}
    assert report["ttft"]["count"] == report["latency"]["count"] == 10
    assert report["output_tokens"] == 60
    assert sorted(report["errors"].values()) == [5, 5]
    assert any("429" in message and "2 s" in message for message in report["errors"])


def test_only_refused_is_no_success(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    said, count = engine.say("word"), iter(range(100))
    engine.script = lambda request: said(request) if next(count) < 2 else [Overloaded("full", 1.0)]
    status, report = bench(url, tmp_path / "run.json", "--requests", "3", "--warmup", "0")
    assert (status, report["counts"]["rejected"]) == (1, 3)


def test_prompts_of_a_file_reach_the_model(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text('one line\n\n{"prompt": "from json"}\n{not json\n')
    flags = ("--endpoint", "completions", "--prompts", str(tmp_path / "prompts"), "--requests", "6", "--warmup", "0")
    status, _ = bench(
        url, tmp_path / "run.json", *flags, "--concurrency", "1", "--no-ignore-eos", "-p", "temperature=0"
    )
    assert status == 0
    asked = sorted(engine.tokenizer.decode(request.prompt) for request in engine.requests)
    assert asked == sorted(["one line", "from json", "{not json"] * 2)
    assert all(request.stop_ids and request.sampling.temperature == 0 for request in engine.requests)


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["--base-url", "http://127.0.0.1:9/v1"], 1, "divisi serve"),
        (["--model", "none"], 1, "a first request failed: HTTP 404"),
        (["-p", "surprise=1"], 1, "surprise"),
        (["--prompts", "/nowhere"], 2, "/nowhere"),
        (["--records"], 2, "needs --json"),
        (["--json", "/nowhere/run.json"], 2, "/nowhere"),
        (["--param", "messages=[]"], 2, "messages"),
    ],
)
def test_mistakes_end_before_the_run(
    arguments: list[str], status: int, part: str, url: str, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--base-url", f"{url}/v1", *arguments]) == status
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    "flags", [["--rate", "0"], ["--requests", "-1"], ["--duration", "inf"], ["--rate", "1", "--concurrency", "2"]]
)
def test_impossible_loads_are_usage_errors(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_ctrl_c_reports_what_was_measured(url: str, engine: FakeEngine, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    said, count = engine.say("word"), iter(range(100))

    def script(request: Any) -> Any:
        if next(count) == 6:  # four requests have ended well since the two probes
            engine.held = "after"
        return said(request)

    engine.script = script
    command = ["bench", "--base-url", f"{url}/v1", "--json", str(out), "--warmup", "0", "--concurrency", "1"]
    process = subprocess.Popen([sys.executable, "-m", "divisi.deploy.cli", *command], stdout=subprocess.PIPE)
    assert engine.waiting.wait(60)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    report = json.loads(out.read_text())
    assert report["interrupted"]
    assert report["counts"] == {"sent": 5, "ok": 4, "rejected": 0, "error": 0, "aborted": 1, "running": 0}


# ---- without a server -------------------------------------------------------------------------------------------


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


async def load(handler: Handler, schedule: Schedule, clock: Callable[[], float]) -> Load:
    async with httpx.AsyncClient(base_url="http://x/v1", transport=httpx.MockTransport(handler)) as client:
        run = Load(client, lambda: {"prompt": "x"}, schedule, clock)
        await run.run()
    return run


def timed(clock: Clock, *steps: tuple[float, dict[str, Any]]) -> httpx.Response:
    """A stream whose events come after given times."""

    async def stream() -> AsyncIterator[bytes]:
        for seconds, event in steps:
            clock.now += seconds
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"

    return httpx.Response(200, content=stream())


async def test_times_are_per_token_not_per_chunk() -> None:
    clock = Clock()

    async def handler(_: httpx.Request) -> httpx.Response:
        clock.now += 0.5
        # Eleven tokens in three chunks; the role comes first and is no token, nor is the usage at the end.
        return timed(
            clock, (0.5, delta(role="assistant", content="")), (1.0, delta(content="a")), (0.25, delta(reasoning="b")),
            (0.75, delta(tool_calls=[{"index": 0}])), (2.0, end("stop", 11)),
        )  # fmt: skip

    run = await load(handler, Schedule("/chat/completions", 1, None, concurrency=1), clock)
    (outcome,) = run.outcomes
    assert outcome.ttft == 2.0
    assert outcome.itl == pytest.approx(0.1)
    assert outcome.longest_gap == 0.75
    assert outcome.latency == 5.0
    assert (outcome.input_tokens, outcome.cached_tokens, outcome.output_tokens) == (7, 4, 11)
    summary = run.summary()
    assert summary.seconds == 5.0
    assert summary.per_second(summary.output_tokens) == pytest.approx(2.2)


async def test_without_usage_no_tokens_are_claimed() -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        return sse([delta(content="a"), delta(content="b")])

    summary = (await load(handler, Schedule("/chat/completions", 3, None, concurrency=1), Clock())).summary()
    assert (summary.counts["ok"], summary.output_tokens, summary.without_usage) == (3, 0, 3)
    assert summary.itl.count == 0


@pytest.mark.parametrize(
    "content",
    [b"data: {\n\n", b'data: {"choices": [7]}\n\ndata: [DONE]\n\n', b'data: {"choices": []}\n\n', b"data: 1\n\n"],
)
async def test_a_strange_stream_is_an_error(content: bytes) -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=content)

    run = await load(handler, Schedule("/chat/completions", 2, None, concurrency=1), Clock())
    assert [outcome.status for outcome in run.outcomes] == ["error", "error"]


async def test_arrivals_at_a_rate_do_not_wait_for_answers() -> None:
    arrived, all_there = 0, asyncio.Event()

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 5:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 20)  # answered only once all have come
        return sse([delta(content="a"), end()])

    loop = asyncio.get_running_loop()
    run = await load(handler, Schedule("/chat/completions", 5, None, rate=200.0, seed=3), loop.time)
    assert run.summary().counts["ok"] == 5
    due = [outcome.due for outcome in run.outcomes]
    rng = random.Random(3)
    gaps = [rng.expovariate(200.0) for _ in range(4)]
    assert np.diff(due) == pytest.approx(gaps)


async def test_concurrency_is_a_bound() -> None:
    now, most = 0, 0

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return sse([delta(content="a"), end()])

    run = await load(handler, Schedule("/chat/completions", 20, None, concurrency=3), asyncio.get_running_loop().time)
    assert (most, run.summary().counts["ok"]) == (3, 20)


async def test_a_duration_stops_sending_and_waits_for_the_rest() -> None:
    clock = Clock()

    async def handler(_: httpx.Request) -> httpx.Response:
        return timed(clock, (4.0, delta(content="a")), (0.0, end()))

    run = await load(handler, Schedule("/chat/completions", None, 10.0, concurrency=1), clock)
    assert [outcome.sent - 100 for outcome in run.outcomes] == [0, 4, 8]
    assert run.summary().seconds == 12.0
    assert run.summary().counts["ok"] == 3


async def test_given_up_requests_are_counted_as_aborted() -> None:
    begun = asyncio.Event()

    async def handler(_: httpx.Request) -> httpx.Response:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    transport = httpx.MockTransport(handler)
    async with httpx.AsyncClient(base_url="http://x/v1", transport=transport) as client:
        run = Load(client, dict, Schedule("/chat/completions", 9, None, concurrency=2), Clock())
        task = asyncio.create_task(run.run())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert {outcome.status for outcome in run.outcomes} == {"aborted"}
    assert run.summary().counts["sent"] == len(run.outcomes) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 10, 101])
def test_percentiles_are_numpys(size: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.exponential(size=size).tolist()
    for percent in (0, 50, 90, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))
    assert Distribution.of([None, *values]).count == size


def test_nothing_measured_is_none_and_not_zero() -> None:
    record = Summary.of([Outcome(0.0, status="rejected", error="full")], 1.0).record()
    assert record["ttft"] == {"count": 0, "mean": None, "p50": None, "p90": None, "p95": None, "p99": None, "max": None}


def test_length_of_prompts_from_two_probes() -> None:
    length = Length.from_probes(short=10 + 3, long=10 + len(WORDS) * 3)
    assert (length.overhead, length.per_word) == (10, 3)
    assert length.words(310) == 100
    assert length.words(5) == 1
