"""/metrics behind a load balancer: each row says which ingress replica counted it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.telemetry.rows import StatRow
from divisi.deploy.api import metrics as module
from divisi.deploy.api.engine_client import GangStatus
from divisi.deploy.api.metrics import Metrics, RequestClock

STATUS = GangStatus(True, "", (StatRow("steps", 3.0, (("worker", "0"),), "counter", "Steps"),))


def page(metrics: Metrics, ordinal: str | None = None) -> dict[str, list[dict[str, str]]]:
    text = metrics.render(STATUS, ordinal).decode()
    return {f.name: [sample.labels for sample in f.samples] for f in text_string_to_metric_families(text)}


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render(STATUS).decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def use(metrics: Metrics) -> None:
    metrics.http_requests.add(1, {"path": "/v1/completions", "method": "POST", "status": "200"})
    clock = RequestClock(metrics, "completion")
    clock.tick(1)
    clock.close(5, ["stop"])


def test_own_rows_are_labelled_and_the_gangs_are_not() -> None:
    metrics = Metrics()
    use(metrics)
    labelled, bare = page(metrics, "1"), page(metrics)
    assert set(labelled) == set(bare), "the same families"
    for name in ("divisi_http_requests", "divisi_time_to_first_token_seconds", "divisi_prompt_tokens"):
        assert labelled[name] == [labels | {"ingress": "1"} for labels in bare[name]]
    # The coordinator keeps these: every replica shows the same, and a label would multiply them in a sum.
    assert labelled["divisi_steps"] == bare["divisi_steps"] == [{"worker": "0"}]
    assert labelled["divisi_ready"] == [{}]


def test_the_names_that_there_were_are_there() -> None:
    metrics = Metrics()
    use(metrics)
    assert {
        "divisi_http_requests", "divisi_http_open_requests", "divisi_prompt_tokens", "divisi_completion_tokens",
        "divisi_requests_finished", "divisi_time_to_first_token_seconds", "divisi_time_per_output_token_seconds",
        "divisi_request_duration_seconds", "divisi_ready", "divisi_steps",
    } <= page(metrics).keys()  # fmt: skip


def test_gaps_and_times_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    clock = RequestClock(metrics, "chat")
    clock.admit("tools")
    instants = iter([10.0, 10.02, 10.02, 11.5, 11.51])
    clock.start = 9.9
    monkeypatch.setattr(module, "perf_counter", lambda: next(instants, 11.51))
    clock.tick(1, 0)  # the first
    clock.tick(2, 0)  # two tokens after 20 ms
    clock.tick(1, 1)  # another choice's first
    clock.tick(1, 0)  # after 1.48 s: a gap
    clock.tick(0, 1)  # nothing has come
    clock.close(7, ["stop", "length"])
    found = samples(metrics)
    assert found["divisi_stream_gaps_total", ()] == 1
    assert found["divisi_inter_token_seconds_count", (("slice", "tools"),)] == 3
    assert found["divisi_inter_token_seconds_bucket", (("le", "0.01"), ("slice", "tools"))] == 2
    assert found["divisi_inter_token_seconds_bucket", (("le", "1.0"), ("slice", "tools"))] == 2
    assert round(found["divisi_inter_token_seconds_sum", (("slice", "tools"),)], 6) == 1.5
    assert found["divisi_time_to_first_token_seconds_bucket", (("le", "0.1"), ("slice", "tools"))] == 1
    assert found["divisi_completion_tokens_total", ()] == 5
    assert found["divisi_requests_finished_total", (("reason", "length"),)] == 1
    assert found["divisi_requests_finished_total", (("reason", "error"),)] == 0, "there from the start"
    key = (
        ("gen_ai_operation_name", "chat"), ("gen_ai_provider_name", "divisi"), ("gen_ai_request_model", "divisi"),
    )  # fmt: skip
    assert found["gen_ai_server_time_to_first_token_seconds_count", key] == 1
