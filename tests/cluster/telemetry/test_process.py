"""A process's metrics: scraped on its port, sent by OTLP, and under vLLM's names."""

from __future__ import annotations

import socket
import time
import urllib.request

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.telemetry import process
from divisi.cluster.telemetry.batches import BatchHistogram
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.rows import StatRow, rank_rows, stat_rows
from divisi.cluster.telemetry.slices import SLICES, slice_of
from divisi.cluster.telemetry.spec import TelemetrySpec
from tests.support.otlp_receiver import otlp_receiver

ROWS = (
    StatRow("steps", 3.0, (), "counter", "Steps"),
    StatRow("requests_running", 2.0, (), "gauge", "Sequences that run"),
    StatRow("kv_pages", 10.0), StatRow("kv_pages_free", 4.0),
    StatRow("accepted_tokens", 5.0, (("slice", "chat"), ("position", "1")), "counter", "Stood"),
    StatRow("accepted_tokens", 2.0, (("slice", "chat"), ("position", "2")), "counter", "Stood"),
)  # fmt: skip


def fill(telemetry: Telemetry) -> None:
    histogram = BatchHistogram("divisi_queue", "Waiting.", (0.1, 1.0), "slice", SLICES)
    histogram.of("chat").observe(0.1)
    histogram.of("chat").observe(0.5, 3)
    histogram.of("tools").observe(7.0)
    telemetry.metrics.show(histogram)
    telemetry.metrics.show_rows(ROWS)
    telemetry.metrics.meter.create_counter("divisi_http_requests", "", "Requests.").add(2, {"path": "/v1/models"})


def families(page: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(page)}


def value(found: dict[str, Metric], family: str, sample: str, **labels: str) -> float:
    (only,) = [s.value for s in found[family].samples if s.name == sample and s.labels == labels]
    return only


def test_a_port_shows_all_kinds() -> None:
    telemetry = Telemetry(TelemetrySpec(), "attention", "127.0.0.1")
    fill(telemetry)
    with urllib.request.urlopen(f"http://127.0.0.1:{telemetry.port}/metrics", timeout=10) as reply:
        found = families(reply.read().decode())
    assert value(found, "divisi_steps", "divisi_steps_total") == 3
    assert value(found, "divisi_http_requests", "divisi_http_requests_total", path="/v1/models") == 2
    assert found["divisi_requests_running"].type == "gauge"
    chat = {
        s.labels["le"]: s.value
        for s in found["divisi_queue_seconds"].samples
        if s.labels.get("slice") == "chat" and "le" in s.labels
    }
    assert chat == {"0.1": 1, "1.0": 4, "+Inf": 4}
    assert value(found, "divisi_queue_seconds", "divisi_queue_seconds_count", slice="tools") == 1
    assert value(found, "divisi_queue_seconds", "divisi_queue_seconds_count", slice="long") == 0
    assert {"process_resident_memory_bytes", "process_cpu_seconds"} <= found.keys()
    telemetry.close()


def test_no_port_where_none_is_wanted() -> None:
    assert Telemetry(TelemetrySpec(scraped=False), "attention", "127.0.0.1").port == 0


def test_metrics_and_spans_are_sent() -> None:
    with otlp_receiver() as received:
        spec = TelemetrySpec(f"{received.url}/v1/traces", f"{received.url}/v1/metrics", scraped=False)
        telemetry = Telemetry(spec, "expert")
        fill(telemetry)
        assert telemetry.tracer is not None
        telemetry.tracer.start_span("something").end()
        telemetry.close()
        assert received.wait_for(lambda r: {"divisi_steps", "divisi_queue", "divisi_http_requests"} <= r.metrics, 10)
        assert [span.name for span in received.spans] == ["something"]
        assert received.spans[0].process.startswith("expert:")


def test_a_collector_that_is_not_there_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SEND_S", 0.5)
    begin = time.monotonic()
    telemetry = Telemetry(TelemetrySpec("http://127.0.0.1:9/v1/traces", scraped=False), "expert")
    assert telemetry.tracer is not None
    telemetry.tracer.start_span("something").end()
    telemetry.close()
    assert time.monotonic() - begin < 4


def test_ports_are_those_that_a_firewall_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        spec = TelemetrySpec(scrape_from_port=first)
        ports = [Telemetry(spec, "attention", "127.0.0.1").port for _ in range(2)]
        assert first < ports[0] < ports[1] < first + process.SCRAPE_PORTS
        monkeypatch.setattr(process, "SCRAPE_PORTS", 1)
        with pytest.raises(OSError, match=f"no port from {first} to {first} is free on 127.0.0.1"):
            Telemetry(spec, "attention", "127.0.0.1")


def test_vllm_names() -> None:
    telemetry = Telemetry(TelemetrySpec(vllm_names=True, model="m", scraped=False), "attention")
    fill(telemetry)
    found = families(generate_latest(telemetry.metrics.registry).decode())
    assert value(found, "vllm:num_requests_running", "vllm:num_requests_running", model_name="m") == 2
    assert value(found, "vllm:kv_cache_usage_perc", "vllm:kv_cache_usage_perc", model_name="m") == pytest.approx(0.6)
    name = "vllm:spec_decode_num_accepted_tokens"
    assert value(found, name, f"{name}_total", model_name="m") == 7, "over all positions"
    name = "vllm:request_queue_time_seconds"
    assert value(found, name, f"{name}_count", model_name="m") == 5
    assert value(found, name, f"{name}_bucket", model_name="m", le="1.0") == 4


@pytest.mark.parametrize(
    ("tokens", "tools", "found"),
    [(8191, False, "chat"), (8191, True, "tools"), (8192, False, "long"), (9000, True, "long")],
)
def test_slices(tokens: int, tools: bool, found: str) -> None:
    assert slice_of(tokens, tools) == found


def test_rows_of_all_seats_say_whose_they_are() -> None:
    stats = {"attention:1": {"steps": 4, "memory_bytes": {"kv": 7.0}}, "expert:0": {"expert_tokens": {"3": 9.0}}}
    rows = stat_rows(stats, {"seats": 2, "seat_joins": {"expert:0": 3}})
    told = {(row.name, row.labels): row.value for row in rows}
    assert told == {
        ("seats", ()): 2, ("seat_joins", (("seat", "expert:0"),)): 3, ("steps", (("worker", "1"),)): 4,
        ("memory_bytes", (("pool", "kv"), ("worker", "1"))): 7,
        ("expert_tokens", (("layer", "3"), ("shard", "0"))): 9,
    }  # fmt: skip
    assert all(row.help for row in rows)
    assert rank_rows({"unknown": 1.0}) == []
