"""/metrics behind a load balancer: each row says which ingress replica counted it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from divisi.deploy.api.engine_client import GangStatus, StatRow
from divisi.deploy.api.metrics import Metrics, RequestClock

STATUS = GangStatus(True, "", (StatRow("steps", 3.0, (("worker", "0"),), "counter", "Steps"),))


def page(metrics: Metrics) -> dict[str, list[dict[str, str]]]:
    text = metrics.render(STATUS).decode()
    return {f.name: [sample.labels for sample in f.samples] for f in text_string_to_metric_families(text)}


def use(metrics: Metrics) -> None:
    metrics.http_requests.labels("/v1/completions", "POST", "200").inc()
    clock = RequestClock(metrics, "completion")
    clock.tick(1)
    clock.close(5, ["stop"])


def test_own_rows_are_labelled_and_the_gangs_are_not() -> None:
    metrics, plain = Metrics("r1"), Metrics()
    use(metrics)
    use(plain)
    labelled, bare = page(metrics), page(plain)
    assert set(labelled) == set(bare), "the same families"
    for name in ("divisi_http_requests", "divisi_time_to_first_token_seconds", "divisi_prompt_tokens"):
        assert labelled[name] == [labels | {"ingress": "r1"} for labels in bare[name]]
    # The coordinator keeps these: every replica shows the same, and a label would multiply them in a sum.
    assert labelled["divisi_steps"] == bare["divisi_steps"] == [{"worker": "0"}]
    assert labelled["divisi_ready"] == [{}]
