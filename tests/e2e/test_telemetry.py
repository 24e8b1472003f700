"""A split cluster watched for real: an OTLP collector, a Prometheus, every panel, every process, a fault."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from divisi.deploy.api.metrics import DURATION_BUCKETS, FIRST_TOKEN_BUCKETS
from divisi.model.demo import checkpoint_dir
from tests.e2e.conftest import Cluster, running_cluster
from tests.e2e.test_serve_split import metric
from tests.support.otlp_receiver import Got, Received, otlp_receiver
from tests.support.ports import free_port
from tests.support.promtool import needs_promtool, promtool
from tests.support.telemetry_load import Answered, Prometheus, ask, load, percentile, wait_for

pytestmark = [pytest.mark.verify, pytest.mark.timeout(600)]

MODEL = "divisi-demo"
SIZES = ("--kv-memory", "64MiB", "--max-seqs", "16", "--max-model-len", "2048", "--device", "cpu")
DASHBOARDS = Path(__file__).parents[2] / "k8s" / "monitoring" / "dashboards"
REQUESTS = 50


def config(folder: Path, **telemetry: object) -> Path:
    file = folder / "divisi.yaml"
    model = {"model_dir": str(checkpoint_dir())}
    file.write_text(yaml.safe_dump({"model": model, "telemetry": telemetry}))
    return file


def serve(folder: Path, *arguments: str, **telemetry: object) -> Any:
    file = str(config(folder, **telemetry))
    sizes = (*SIZES, "--config", file, "--max-queued-requests", "256")
    return running_cluster(checkpoint_dir(), folder / "log.txt", *arguments, *sizes, ready_within_s=180.0)


# Traces: two attention workers, two shards, two ingresses.


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Received]]:
    shape = ("--attention-workers", "2", "--expert-shards", "2", "--ingress-replicas", "2")
    with otlp_receiver() as received:
        endpoints = {"traces_endpoint": received.url, "metrics_endpoint": f"{received.url}/v1/metrics"}
        with serve(tmp_path_factory.mktemp("traced"), *shape, **endpoints, step_ratio=0.2) as cluster:
            # The gang serves with one worker, and the other comes a moment later.
            wait_for(lambda: len(metric(cluster, "requests_running")) == 2, 30)
            yield cluster, received


def of_requests(received: Received) -> dict[str, list[Got]]:
    return {name: spans for name, spans in received.traces().items() if any(s.name == f"chat {MODEL}" for s in spans)}


def whole(spans: list[Got]) -> bool:
    names = Counter(span.name for span in spans)
    return {f"chat {MODEL}", "ingress", "queue", "prefill", "decode", "detokenise"} <= names.keys()


@pytest.mark.timeout(280)
def test_one_tree_for_each_request(
    traced: tuple[Cluster, Received], record_result: Callable[[str, object], None]
) -> None:
    cluster, received = traced
    answers = load(cluster.url, MODEL, REQUESTS, 8, 24)
    assert len(answers) == REQUESTS
    assert received.wait_for(lambda got: sum(map(whole, of_requests(got).values())) == REQUESTS, 30), "some are missing"
    trees = of_requests(received)
    assert len(trees) == REQUESTS, "exactly one each"
    processes: Counter[str] = Counter()
    for spans in trees.values():
        names = Counter(span.name for span in spans)
        names.pop("gang status", None)  # of whoever had to ask
        expected = (f"chat {MODEL}", "ingress", "queue", "prefill", "decode", "detokenise")
        assert names == dict.fromkeys(expected, 1), names
        (root,) = [span for span in spans if not span.parent_id]
        assert root.name == f"chat {MODEL}"
        assert {span.parent_id for span in spans if span is not root} == {root.span_id}
        by_name = {span.name: span for span in spans}
        order = [by_name[name] for name in ("queue", "prefill", "decode")]
        assert all(before.end_ns <= after.start_ns + 1000 for before, after in pairwise(order))
        outside = {
            span.name: ((span.start_ns - root.start_ns) / 1e6, (span.end_ns - root.end_ns) / 1e6)
            for span in spans
            if not root.start_ns - 1e6 <= span.start_ns <= span.end_ns <= root.end_ns + 1e9
        }
        assert not outside, f"ms from the root's begin and end: {outside}"
        processes.update({by_name["ingress"].process, by_name["decode"].process})
        told = {**root.attributes}
        assert told["gen_ai.usage.output_tokens"] > 0
        assert not any("weather" in str(value) for span in spans for value in span.attributes.values()), "content"
    record_result("traces by process", dict(processes))
    roles = Counter(process.partition(":")[0] for process in processes)
    assert roles == {"ingress": 2, "attention": 2}, "all processes had their part"
    tokens = sum(s.attributes["gen_ai.usage.output_tokens"] for t in trees.values() for s in t if not s.parent_id)
    assert tokens == sum(answer.completion_tokens for answer in answers)


@pytest.mark.timeout(120)
def test_sampled_steps_have_a_span_for_each_rank(traced: tuple[Cluster, Received]) -> None:
    cluster, received = traced
    load(cluster.url, MODEL, 8, 8, 24)

    def steps(got: Received) -> list[list[Got]]:
        found = [spans for spans in got.traces().values() if any(span.name == "step" for span in spans)]
        return [spans for spans in found if len({s.process for s in spans}) == 4]

    assert received.wait_for(lambda got: any(any(s.links for s in spans) for spans in steps(got)), 30)
    requests = {(span.trace_id, span.span_id) for spans in of_requests(received).values() for span in spans}
    for spans in steps(received):
        by_seat = {span.attributes.get("divisi.seat"): span for span in spans if span.name == "step"}
        assert set(by_seat) == {"attention:0", "attention:1", "expert:0", "expert:1"}
        root = by_seat["attention:0"]
        assert root.parent_id == ""
        assert {span.parent_id for seat, span in by_seat.items() if seat != "attention:0"} == {root.span_id}
        assert len({span.attributes["divisi.step"] for span in by_seat.values()}) == 1
        for seat, span in by_seat.items():
            passes = [s for s in spans if s.parent_id == span.span_id and s.name.endswith("pass")]
            assert [s.name for s in passes][-1] == "full pass"
            waited = "divisi.time.wait" if str(seat).startswith("expert") else "divisi.time.experts"
            if passes[-1].attributes["divisi.rows"]:
                assert passes[-1].attributes[waited] > 0
    linked = {link for spans in steps(received) for span in spans for link in span.links}
    assert linked & requests, "steps name the requests in them"


@pytest.mark.timeout(60)
def test_metrics_are_sent_too_and_the_clients_trace_goes_on(traced: tuple[Cluster, Received]) -> None:
    cluster, received = traced
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        ask(client, MODEL, 1, 4, {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
        ask(client, MODEL, 2, 4, {"traceparent": f"00-{'1' * 32}-00f067aa0ba902b7-00"})
    assert received.wait_for(lambda got: whole(got.traces().get(trace_id, [])), 20)
    (root,) = [span for span in received.traces()[trace_id] if span.name.startswith("chat")]
    assert root.parent_id == "00f067aa0ba902b7"
    assert "1" * 32 not in received.traces()
    wanted = {"divisi_steps", "divisi_http_requests", "divisi_epochs", "divisi_expert_tokens", "divisi_queue"}
    assert received.wait_for(lambda got: wanted <= got.metrics, 30)
    named = re.search(r"^Request log: (.*?)(?:,|$)", cluster.log.read_text(), re.MULTILINE)
    assert named is not None
    lines = [json.loads(line) for line in Path(named[1]).read_text().splitlines()]
    assert [line["request_id"] for line in lines if line.get("trace_id") == trace_id], "the log has both ids"


# Metrics: one attention worker, two shards, three ingresses, and a Prometheus.


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Prometheus]]:
    folder = tmp_path_factory.mktemp("watched")
    shape = ("--expert-shards", "2", "--ingress-replicas", "3")
    with serve(folder, *shape) as cluster, monitored(cluster, folder) as seen:
        wait_for(lambda: len(seen.query("up == 1")) == 7, 60)
        yield cluster, seen


@contextmanager
def monitored(cluster: Cluster, folder: Path) -> Iterator[Prometheus]:
    """`divisi monitor` beside the server."""
    listen = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "divisi.deploy.cli", "monitor", "--base-url", f"{cluster.url}/v1"]
    options = ["--listen", listen, "--data", str(folder / "prometheus"), "--every", "1"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _answers(f"http://{listen}/-/ready"), 30)
        yield Prometheus(f"http://{listen}")
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


COUNTED: dict[str, Callable[[list[Answered]], float]] = {
    'sum(divisi_http_requests_total{path="/v1/chat/completions", status="200"})': len,
    "sum(divisi_prompt_tokens_total)": lambda answers: sum(answer.prompt_tokens for answer in answers),
    "sum(divisi_completion_tokens_total)": lambda answers: sum(answer.completion_tokens for answer in answers),
    'sum(divisi_requests_finished_total{reason="length"})': lambda answers: _ended(answers, "length"),
    'sum(divisi_requests_finished_total{reason="stop"})': lambda answers: _ended(answers, "stop"),
    'sum(divisi_requests_finished_total{reason="tool_calls"})': lambda answers: _ended(answers, "tool_calls"),
    'sum(divisi_time_to_first_token_seconds_count{slice="tools"})': lambda answers: _of(answers, "tools"),
    'sum(divisi_request_duration_seconds_count{slice="chat"})': lambda answers: _of(answers, "chat"),
    "sum(divisi_queue_seconds_count)": len,
    "sum(divisi_prefill_seconds_count)": len,
}


def _ended(answers: list[Answered], reason: str) -> int:
    return sum(answer.finish_reason == reason for answer in answers)


def _of(answers: list[Answered], name: str) -> int:
    return sum(answer.slice == name for answer in answers)


@needs_promtool
@pytest.mark.timeout(280)
def test_counters_equal_the_clients_own_and_so_do_percentiles(
    watched: tuple[Cluster, Prometheus], tmp_path: Path, record_result: Callable[[str, object], None]
) -> None:
    cluster, seen = watched
    before = {query: seen.value(query) for query in COUNTED}
    # Few at once: what a request waits for in its client is no time of the server's.
    answers = load(cluster.url, MODEL, 240, 4, 24)
    expected = {query: before[query] + count(answers) for query, count in COUNTED.items()}
    wait_for(lambda: all(seen.value(query) >= wanted for query, wanted in expected.items()), 30)
    threading.Event().wait(3.0)  # three scrapes more, in which nothing may be added
    assert {query: seen.value(query) for query in COUNTED} == expected
    by_ingress = {m["ingress"]: v for m, v in seen.query("sum by (ingress) (divisi_completion_tokens_total)")}
    assert set(by_ingress) == {"0", "1", "2"}, "ordinals"
    record_result("answers, and tokens by ingress", (len(answers), by_ingress))
    command = [sys.executable, "-m", "divisi.deploy.cli", "report", "--base-url", f"{cluster.url}/v1"]
    files = ["--json", str(tmp_path / "report.json"), "--html", str(tmp_path / "report.html")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, timeout=60, check=True)
    assert "Latency" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["completion_tokens"] == sum(answer.completion_tokens for answer in answers) + before[
        "sum(divisi_completion_tokens_total)"
    ]
    assert report["imbalance"] >= 1
    assert report["acceptance"]["all"] > 0
    compared = {}
    for title, bounds, of in (
        ("first token", FIRST_TOKEN_BUCKETS, lambda answer: answer.first_s),
        ("completion", DURATION_BUCKETS, lambda answer: answer.total_s),
    ):
        for name in ("chat", "tools"):
            own = [of(answer) for answer in answers if answer.slice == name]
            for share, label in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
                mine, told = percentile(own, share), report["latencies"][title][name][label]
                compared[f"{title} {name} {label}"] = (round(mine, 4), round(told, 4))
                assert abs(bisect_left(bounds, mine) - bisect_left(bounds, told)) <= 1, (title, name, label, mine, told)
    record_result("percentiles, the client's and the report's", compared)
    stored = [*command, "--prometheus", seen.url, "--last", "120"]
    assert "Latency" in subprocess.run(stored, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_promtool
@pytest.mark.timeout(200)
def test_every_panel_of_every_dashboard_returns_data(watched: tuple[Cluster, Prometheus]) -> None:
    cluster, seen = watched
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            load(cluster.url, MODEL, 12, 6, 24)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        threading.Event().wait(25.0)
        empty = []
        for file in sorted(DASHBOARDS.glob("*.json")):
            board = json.loads(file.read_text())
            for panel in board["panels"]:
                for target in panel["targets"]:
                    found = seen.query(target["expr"].replace("$__rate_interval", "20s"))
                    if not any(math.isfinite(value) for _, value in found):
                        empty.append(f"{board['title']}: {panel['title']}: {target['expr']}")
        assert empty == []
    finally:
        stop.set()
        thread.join(60)


@needs_promtool
@pytest.mark.timeout(60)
def test_promtool_likes_each_process_and_none_has_too_many_series(
    watched: tuple[Cluster, Prometheus], record_result: Callable[[str, object], None]
) -> None:
    cluster, _ = watched
    groups = httpx.get(f"{cluster.url}/metrics/targets", timeout=10).json()
    assert Counter(group["labels"]["role"] for group in groups) == {
        "coordinator": 1, "ingress": 3, "attention": 1, "expert": 2,
    }  # fmt: skip
    counts = {}
    for group in groups:
        (target,) = group["targets"]
        page = httpx.get(f"http://{target}/metrics", timeout=10).text
        done = promtool("check", "metrics", stdin=page)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), group
        name = " ".join(group["labels"].values())
        counts[name] = sum(len(family.samples) for family in text_string_to_metric_families(page))
    record_result("series by process", counts)
    assert max(counts.values()) <= 700


@needs_promtool
@pytest.mark.timeout(280)
def test_a_stopped_shard_fires_the_alerts_that_it_should(
    watched: tuple[Cluster, Prometheus], record_result: Callable[[str, object], None]
) -> None:
    """A shard that hangs: the gang is not ready, and the streams that were open have a gap when it is back."""
    cluster, seen = watched
    assert not {"DivisiGangNotReady", "DivisiStreamGaps"} & seen.firing()
    got: list[float] = []

    def stream() -> None:
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 1500, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=200) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    got.append(time.monotonic())

    reader = threading.Thread(target=stream)
    reader.start()
    wait_for(lambda: len(got) > 5, 20)
    shard: psutil.Process = cluster.shards()[0]
    os.kill(shard.pid, signal.SIGSTOP)
    try:
        took = wait_for(lambda: "DivisiGangNotReady" in seen.firing(), 90)
    finally:
        os.kill(shard.pid, signal.SIGCONT)
    record_result("seconds until the alert of a gang that is not ready", round(took, 1))
    cluster.wait_until_ready(90)
    took = wait_for(lambda: "DivisiStreamGaps" in seen.firing(), 90)
    record_result("seconds from ready to the alert of gaps", round(took, 1))
    reader.join(120)
    assert not reader.is_alive()
    assert len(got) > 500, "the stream went on"
    wait_for(lambda: "DivisiGangNotReady" not in seen.firing(), 30)


@pytest.mark.timeout(200)
def test_an_answer_that_goes_on_elsewhere_is_one_tree(traced: tuple[Cluster, Received]) -> None:
    """A worker is killed under open streams: the resumption is an event of the root span."""
    cluster, received = traced
    trace_ids = [f"{number:032x}" for number in range(1, 9)]
    with httpx.Client(base_url=cluster.url, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(ask, client, MODEL, 3 * number + 1, 500, {"traceparent": f"00-{trace_id}-{'1' * 16}-01"}, True)
            for number, trace_id in enumerate(trace_ids)
        ]
        wait_for(lambda: _running(cluster) >= 8, 30)
        cluster.processes("AttentionWorker")[0].kill()
        assert all(answer.result().completion_tokens for answer in answers)
    assert received.wait_for(lambda got: all(whole(got.traces().get(name, [])) for name in trace_ids), 30)
    roots = [span for name in trace_ids for span in received.traces()[name] if span.name == f"chat {MODEL}"]
    assert len(roots) == len(trace_ids), "one tree each"
    assert sum("divisi.resumed" in root.events for root in roots) > 0, "some were on the worker that died"
    for root in roots:
        spans = received.traces()[root.trace_id]
        assert {span.parent_id for span in spans if span is not root} == {root.span_id}
    cluster.wait_until_ready(90)


def _running(cluster: Cluster) -> float:
    page = httpx.get(f"{cluster.url}/metrics", timeout=10).text
    return sum(float(value) for value in re.findall(r"^divisi_requests_running{[^}]*} (\S+)$", page, re.MULTILINE))
