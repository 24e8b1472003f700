"""Every alert fires where it shall and nowhere else, by promtool's own evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from divisi.deploy.monitoring.alerts import ALERTS, rules
from tests.support.promtool import needs_promtool, promtool

COPY = Path(__file__).parents[3] / "k8s" / "monitoring" / "alerts.yaml"


@dataclass(frozen=True)
class Case:
    """Series by minute, in promtool's notation, and when which alert has fired."""

    alert: str
    series: dict[str, str]
    fires_at: str
    """Empty where it must not fire."""
    calm_at: str = "1m"
    """When it has not fired."""


SIZE, FREE = 'divisi_memory_bytes{worker="0", pool="kv"}', 'divisi_memory_free_bytes{worker="0", pool="kv"}'
READY = 'divisi_ready{role="coordinator"}'
JOINS = 'divisi_seat_joins_total{role="coordinator", seat="expert:1"}'
CASES = {
    "not ready": Case("DivisiGangNotReady", {READY: "1 1 1 0x10"}, "4m", "2m"),
    "coordinator gone": Case("DivisiGangNotReady", {READY: "1 1 stale"}, "8m"),
    "ready again": Case("DivisiGangNotReady", {READY: "1 0 1x20"}, "", "3m"),
    "churning": Case("DivisiEpochsChurning", {'divisi_epochs_total{role="coordinator"}': "1+1x20"}, "10m"),
    "one epoch": Case("DivisiEpochsChurning", {'divisi_epochs_total{role="coordinator"}': "1x5 2x20"}, "", "12m"),
    "queue grows": Case("DivisiQueueGrowing", {'divisi_requests_waiting{worker="0"}': "0x6 2+3x20"}, "12m"),
    "queue stands": Case("DivisiQueueGrowing", {'divisi_requests_waiting{worker="0"}': "9x30"}, "", "20m"),
    "drafts fall": Case(
        "DivisiAcceptanceFallen",
        {"divisi_drafted_tokens_total": "0+600x400", "divisi_accepted_tokens_total": "0+480x300 144000+120x100"},
        "330m", "290m",
    ),
    "drafts stand": Case(
        "DivisiAcceptanceFallen",
        {"divisi_drafted_tokens_total": "0+600x400", "divisi_accepted_tokens_total": "0+480x400"}, "", "390m",
    ),
    "uneven": Case(
        "DivisiShardsUneven",
        {'divisi_expert_tokens_total{shard="0"}': "0+300x40", 'divisi_expert_tokens_total{shard="1"}': "0+30x40"},
        "25m",
    ),
    "even": Case(
        "DivisiShardsUneven",
        {'divisi_expert_tokens_total{shard="0"}': "0+300x40", 'divisi_expert_tokens_total{shard="1"}': "0+250x40"},
        "", "30m",
    ),
    "memory short": Case(
        "DivisiMemoryShort",
        {SIZE: "100x30", FREE: "2x30"},
        "8m",
    ),
    "memory there": Case(
        "DivisiMemoryShort",
        {SIZE: "100x30", FREE: "40x30"},
        "", "20m",
    ),
    "a model without KV": Case(
        "DivisiMemoryShort",
        {SIZE: "0x30", FREE: "0x30"},
        "", "20m",
    ),
    "gaps": Case("DivisiStreamGaps", {'divisi_stream_gaps_total{ingress="0"}': "0 0 0 2 2 2 2 2"}, "3m", "2m"),
    "no gaps": Case("DivisiStreamGaps", {'divisi_stream_gaps_total{ingress="0"}': "5x20"}, "", "10m"),
    "restarts": Case("DivisiShardRestarts", {JOINS: "1 1 2 3 4 5 5 5 5 5 5"}, "6m"),
    "one restart": Case("DivisiShardRestarts", {JOINS: "1 1 2x20"}, "", "10m"),
}  # fmt: skip


def firing(alert: str, at: str, wanted: bool) -> dict[str, object]:
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    return {"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": 1}] if wanted else []}


@needs_promtool
def test_each_fires_where_it_shall(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(rules())
    tests = []
    for name, case in CASES.items():
        expected = [firing(case.alert, case.calm_at, False)]
        if case.fires_at:
            expected.append(firing(case.alert, case.fires_at, True))
        series = [{"series": key, "values": values} for key, values in case.series.items()]
        tests.append({"interval": "1m", "name": name, "input_series": series, "promql_expr_test": expected})
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "tests": tests}))
    done = promtool("test", "rules", str(tmp_path / "test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_valid() -> None:
    done = promtool("check", "rules", str(COPY))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_each_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    names = {alert.name for alert in ALERTS}
    assert {case.alert for case in CASES.values() if case.fires_at} == names
    assert {case.alert for case in CASES.values() if not case.fires_at} == names


def test_the_copy_for_kubernetes_is_what_the_code_says() -> None:
    assert COPY.read_text() == rules(), "run `make monitoring`"
