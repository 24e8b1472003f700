"""The figures of a report, where they come from, and how they look."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest

from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.api.metrics import FIRST_TOKEN_BUCKETS, Metrics
from divisi.deploy.cli import report as command
from divisi.deploy.cli.main import build_parser
from divisi.deploy.report import sources
from divisi.deploy.report.figures import figures, quantile
from divisi.deploy.report.sources import Samples, SourceError, scrape, stored
from divisi.deploy.report.spelling import as_page, as_text
from tests.support.metric_names import pages


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_a_quantile_is_within_the_bucket_of_the_true_one(seed: int, share: float) -> None:
    rng = random.Random(seed)
    values = sorted(rng.lognormvariate(-2, 1) for _ in range(500))
    counts = dict.fromkeys((*FIRST_TOKEN_BUCKETS, math.inf), 0.0)
    for value in values:
        counts[min(bound for bound in counts if value <= bound)] += 1
    true, found = values[math.ceil(share * 500) - 1], quantile(counts, share)
    upper = min(bound for bound in counts if true <= bound)
    lower = max((bound for bound in counts if bound < upper), default=0.0)
    assert found is not None
    assert lower <= found <= upper, f"seed {seed}"


def test_quantiles_at_the_edges() -> None:
    assert quantile({}, 0.5) is None
    assert quantile({1.0: 0, math.inf: 0}, 0.5) is None
    assert quantile({1.0: 4, math.inf: 0}, 0.5) == 0.5
    assert quantile({1.0: 1, 2.0: 0, math.inf: 9}, 0.99) == 2.0, "all that is known is that it is more"


def samples() -> Samples:
    made = Samples(10.0, "a test")
    for ingress, factor in (("0", 1.0), ("1", 3.0)):
        for bound, upto in (("0.1", 2), ("1.0", 4), ("+Inf", 4)):
            labels = {"ingress": ingress, "le": bound, "slice": "tools"}
            made.add("divisi_time_to_first_token_seconds_bucket", labels, factor * upto)
        made.add("divisi_completion_tokens_total", {"ingress": ingress}, 50 * factor)
        made.add("divisi_requests_finished_total", {"ingress": ingress, "reason": "stop"}, 4 * factor)
    for shard, rows in (("0", 300.0), ("1", 100.0)):
        made.add("divisi_expert_tokens_total", {"shard": shard, "layer": "0", "instance": shard}, rows)
        made.add("divisi_expert_busiest_ratio", {"shard": shard, "layer": "0"}, 1.5 + int(shard))
    made.add("divisi_memory_bytes", {"worker": "0", "pool": "kv"}, 1000.0)
    made.add("divisi_memory_free_bytes", {"worker": "0", "pool": "kv"}, 250.0)
    for position, drafted, stood in (("1", 10, 9), ("2", 10, 6)):
        labels = {"worker": "0", "slice": "chat", "position": position}
        made.add("divisi_drafted_tokens_total", labels, drafted)
        made.add("divisi_accepted_tokens_total", labels, stood)
    made.lines["running"] = [(-20.0, 1.0), (-10.0, 3.0), (0.0, 2.0)]
    return made


def test_figures_are_over_all_processes() -> None:
    report = figures(samples())
    first = report.latencies["first token"]["tools"]
    assert (first.count, first.p50) == (16, 0.1)
    assert first.p95 == pytest.approx(0.91)
    assert report.latencies["first token"]["all"] == first
    assert "chat" not in report.latencies["first token"], "nothing was seen of it"
    assert report.completion_tokens == 200
    assert report.tokens_per_second == 20
    assert report.finished == {"stop": 16}
    assert report.imbalance == 1.5
    assert report.busiest_expert == 2.5
    assert report.memory == {"worker 0 kv": {"bytes": 1000.0, "free": 0.25}}
    assert report.acceptance == {"all": 0.75, "1": 0.9, "2": 0.6}


def test_of_nothing_there_is_nothing() -> None:
    report = figures(Samples(0.0, "nothing"))
    assert report.tokens_per_second is report.imbalance is report.busiest_expert is None
    assert report.latencies == {"first token": {}, "completion": {}, "between tokens": {}}
    assert "none were made" in as_text(report)
    assert "<h2>Latency</h2>" in as_page(report)


def test_text_json_and_page_say_the_same() -> None:
    report = figures(samples())
    text, page, plain = as_text(report), as_page(report), json.loads(json.dumps(report.plain()))
    for told in ("100.0 ms", "910.0 ms", "90.0%", "1.50", "25%"):
        assert told in text
        assert told in page
    assert plain["latencies"]["first token"]["tools"]["p50"] == 0.1
    assert len({line.index("p50") for line in text.splitlines() if "p50" in line}) == 1


class Balanced(HTMLParser):
    """Complains of tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_plots_and_is_whole() -> None:
    parser = Balanced()
    parser.feed(as_page(figures(samples())))
    assert parser.open == []
    assert parser.seen.count("svg") == 3, "two slices of one latency, and a course"
    assert "polyline" in parser.seen
    assert not re.search(r"(src|href)=", as_page(figures(samples()))), "it needs nothing but itself"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, httpx.Response]:
    """Replies by URL, without its query."""
    replies: dict[str, httpx.Response] = {}

    def reply(request: httpx.Request) -> httpx.Response:
        found = replies.get(str(request.url.copy_with(query=None)))
        return found or httpx.Response(404)

    original = httpx.Client
    monkeypatch.setattr(
        sources.httpx, "Client", lambda **given: original(**given, transport=httpx.MockTransport(reply))
    )
    return replies


def test_a_running_server_is_scraped_process_by_process(answers: dict[str, httpx.Response]) -> None:
    shown = pages()
    answers["http://server/metrics/targets"] = httpx.Response(200, json=[
        {"targets": ["h:1"], "labels": {"role": "attention", "worker": "0"}},
        {"targets": ["h:2"], "labels": {"role": "expert", "shard": "0"}},
        {"targets": ["h:3"], "labels": {"role": "expert", "shard": "1"}},
        {"targets": ["h:4"], "labels": {"role": "ingress", "ingress": "0"}},
    ])  # fmt: skip
    for port, role in ((1, "attention"), (2, "expert"), (3, "expert"), (4, "ingress")):
        answers[f"http://h:{port}/metrics"] = httpx.Response(200, text=shown[role])
    report = figures(scrape("http://server", {}))
    assert report.imbalance == 1.0
    assert report.memory == {
        "worker 0 kv": {"bytes": 20.0, "free": 0.5},
        "worker 0 state": {"bytes": 40.0, "free": 0.5},
    }


def test_stored_metrics_are_asked_for_by_query(answers: dict[str, httpx.Response]) -> None:
    entry = {
        "metric": {"__name__": "x", "job": "divisi", "role": "ingress", "le": "1.0", "pool": "kv"},
        "value": [1.0, "7"],
        "values": [[1.0, "7"]],
    }
    found = httpx.Response(200, json={"status": "success", "data": {"result": [entry]}})
    answers["http://prometheus/api/v1/query"] = answers["http://prometheus/api/v1/query_range"] = found
    taken = stored("http://prometheus", 60)
    assert taken.sum("divisi_completion_tokens_total") == 7
    assert figures(taken).tokens_per_second == 7 / 60
    assert [value for _, value in taken.lines["running"]] == [7.0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (httpx.Response(500), "cannot be read"),
        (httpx.Response(200, text="hello"), "does not answer as Prometheus"),
        (httpx.Response(200, json={"status": "error", "error": "too much"}), "too much"),
        (httpx.Response(200, json={"status": "success", "data": {"result": []}}), "has no metrics of Divisi"),
    ],
)
def test_what_is_wrong_is_said(answers: dict[str, httpx.Response], reply: httpx.Response, message: str) -> None:
    answers["http://prometheus/api/v1/query"] = answers["http://prometheus/api/v1/query_range"] = reply
    with pytest.raises(SourceError, match=message):
        stored("http://prometheus", 60)


def test_a_server_without_targets_is_said(answers: dict[str, httpx.Response]) -> None:
    answers["http://server/metrics/targets"] = httpx.Response(200, json=[])
    with pytest.raises(SourceError, match="names no process to scrape"):
        scrape("http://server", {})


def test_the_command_writes_all_three(
    answers: dict[str, httpx.Response], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers["http://127.0.0.1:8000/metrics/targets"] = httpx.Response(
        200, json=[{"targets": ["h:1"], "labels": {"role": "attention", "worker": "0"}}]
    )
    answers["http://h:1/metrics"] = httpx.Response(200, text=pages()["attention"])
    args: argparse.Namespace = build_parser().parse_args(
        ["report", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    )
    assert command.run(args) == 0
    assert "Latency" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["memory"]["worker 0 kv"]["free"] == 0.5
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_the_text_of_a_process_is_read_as_it_is_written() -> None:
    telemetry = Telemetry(TelemetrySpec(scraped=False), "ingress")
    metrics = Metrics(telemetry.metrics)
    metrics.first_token.of("long").observe(0.2)
    taken = Samples(1.0, "")
    sources._take(taken, generate_latest(telemetry.metrics.registry).decode(), {"role": "ingress"})
    first = figures(taken).latencies["first token"]["long"]
    assert first.count == 1
    assert first.p50 is not None
    assert 0.15 <= first.p50 <= 0.25
