"""The alerts, as Prometheus's rules. `divisi monitor` uses them, and a copy lies in `k8s/monitoring/alerts.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import yaml

HEADER = "# Written by `make monitoring` from deploy/monitoring/alerts.py.\n"


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule. `summary` and `remedy` may use Prometheus's templates."""

    name: str
    expr: str
    held_for: str
    severity: Literal["critical", "warning"]
    summary: str
    remedy: str


ALERTS = (
    Alert(
        "DivisiGangNotReady",
        'max(divisi_ready{role="coordinator"}) == 0 or absent(divisi_ready{role="coordinator"})',
        "30s", "critical",
        "The gang cannot serve: new requests get a 503",
        "GET /v1/health/ready names the seats that are missing; see the logs of their processes",
    ),
    Alert(
        "DivisiEpochsChurning",
        'increase(divisi_epochs_total{role="coordinator"}[10m]) > 4',
        "0s", "warning",
        "{{ $value | humanize }} epochs in ten minutes: ranks keep leaving",
        "The coordinator's and the ranks' logs say why each epoch ended",
    ),
    Alert(
        "DivisiQueueGrowing",
        "sum(avg_over_time(divisi_requests_waiting[2m])) > 1 and "
        "sum(avg_over_time(divisi_requests_waiting[2m]))"
        " > 1.5 * sum(avg_over_time(divisi_requests_waiting[2m] offset 5m))",
        "3m", "warning",
        "{{ $value | humanize }} requests wait on average, and more and more",
        "Add attention workers, or lower limits.max_queued_requests so that clients retry elsewhere",
    ),
    Alert(
        "DivisiAcceptanceFallen",
        "(sum(rate(divisi_accepted_tokens_total[10m])) / sum(rate(divisi_drafted_tokens_total[10m])))"
        " < 0.7 * (sum(rate(divisi_accepted_tokens_total[6h])) / sum(rate(divisi_drafted_tokens_total[6h])))"
        " and sum(rate(divisi_drafted_tokens_total[10m])) > 1",
        "10m", "warning",
        "Of the drafts {{ $value | humanizePercentage }} stand, far less than in the last six hours",
        "What is asked has changed, or the MTP layer does not belong to the weights; compare divisi report by slice",
    ),
    Alert(
        "DivisiShardsUneven",
        "max(sum by (shard) (rate(divisi_expert_tokens_total[10m])))"
        " > 1.5 * avg(sum by (shard) (rate(divisi_expert_tokens_total[10m])))",
        "10m", "warning",
        "One expert shard gets {{ $value | humanize }} rows a second, more than half as much again as the mean",
        "See the dashboard of experts: the busiest experts of a layer lie on one shard",
    ),
    Alert(
        "DivisiMemoryShort",
        "min by (worker, pool) (avg_over_time(divisi_memory_free_bytes[5m])"
        " / (avg_over_time(divisi_memory_bytes[5m]) > 0)) < 0.05",
        "5m", "warning",
        "Worker {{ $labels.worker }} has {{ $value | humanizePercentage }} of its {{ $labels.pool }} memory free",
        "Raise cache.kv_memory or cache.max_seqs, or add attention workers; preemptions compute prompts again",
    ),
    Alert(
        "DivisiStreamGaps",
        "sum(increase(divisi_stream_gaps_total[2m])) > 0",
        "0s", "warning",
        "{{ $value | humanize }} times in two minutes an answer stood still for a second or more",
        "An epoch that ended, or steps that take too long: see the dashboard of the gang",
    ),
    Alert(
        "DivisiShardRestarts",
        'sum by (seat) (increase(divisi_seat_joins_total{role="coordinator", seat=~"expert:.*"}[15m])) > 2',
        "0s", "critical",
        "{{ $labels.seat }} was started {{ $value | humanize }} times in a quarter of an hour",
        "Its log, and the kernel's (out of memory), say why the process ends",
    ),
)  # fmt: skip


def rules() -> str:
    """The file for Prometheus's `rule_files`."""
    written = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.held_for,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "remedy": alert.remedy},
        }
        for alert in ALERTS
    ]
    groups = {"groups": [{"name": "divisi", "rules": written}]}
    spelled: str = yaml.safe_dump(groups, sort_keys=False, width=150, allow_unicode=True)
    return HEADER + spelled
