"""The figures of a report, from samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from divisi.cluster.telemetry.slices import SLICES
from divisi.deploy.report.sources import Samples

SHARES = (0.5, 0.95, 0.99)
FAMILIES = {
    "first token": "divisi_time_to_first_token_seconds",
    "completion": "divisi_request_duration_seconds",
    "between tokens": "divisi_inter_token_seconds",
}


@dataclass(frozen=True)
class Latency:
    """Seconds. `buckets` are counts by upper bound, each without those below it."""

    count: int
    p50: float | None
    p95: float | None
    p99: float | None
    buckets: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All figures. What nothing was seen of is None, or not there."""

    where: str
    seconds: float
    latencies: dict[str, dict[str, Latency]]
    """By what is timed, and by slice; `all` is over all slices."""
    prompt_tokens: float
    completion_tokens: float
    tokens_per_second: float | None
    finished: dict[str, float]
    memory: dict[str, dict[str, float]]
    """By worker and pool: bytes, and the share that is free."""
    resident_bytes: dict[str, float]
    """By role."""
    acceptance: dict[str, float]
    """Share of drafts that stood, by position in a step; `all` is over all positions."""
    imbalance: float | None
    """Rows of the busiest shard, or colocated worker, over the mean."""
    busiest_expert: float | None
    """Rows of the busiest expert of any layer over the mean of its layer and rank."""
    gaps: float
    epochs: float
    aborted_steps: float
    lines: dict[str, list[tuple[float, float]]]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def figures(samples: Samples) -> Report:
    """The figures of some samples."""
    tokens = samples.sum("divisi_completion_tokens_total")
    return Report(
        where=samples.where,
        seconds=samples.seconds,
        latencies={title: _latencies(samples, family) for title, family in FAMILIES.items()},
        prompt_tokens=samples.sum("divisi_prompt_tokens_total"),
        completion_tokens=tokens,
        tokens_per_second=tokens / samples.seconds if samples.seconds else None,
        finished=_by(samples, "divisi_requests_finished_total", "reason"),
        memory=_memory(samples),
        resident_bytes=_by(samples, "process_resident_memory_bytes", "role"),
        acceptance=_acceptance(samples),
        imbalance=_imbalance(samples),
        busiest_expert=max(samples.of("divisi_expert_busiest_ratio").values(), default=None),
        gaps=samples.sum("divisi_stream_gaps_total"),
        epochs=samples.sum("divisi_epochs_total"),
        aborted_steps=samples.sum("divisi_aborted_steps_total"),
        lines=samples.lines,
    )


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """A percentile of counts by upper bound, as Prometheus reckons: evenly spread within a bucket, from 0 in the first.

    Of the bucket without a bound, the bound before it. None of no counts.
    """
    total = sum(buckets.values())
    if total <= 0:
        return None
    wanted, lower = share * total, 0.0
    for upper, count in sorted(buckets.items()):
        if count >= wanted and count > 0:
            return lower if math.isinf(upper) else lower + (upper - lower) * wanted / count
        wanted -= count
        lower = upper if not math.isinf(upper) else lower
    return lower


def _latencies(samples: Samples, family: str) -> dict[str, Latency]:
    of_slice = {name: _buckets(samples, family, slice=name) for name in SLICES}
    found = {"all": _buckets(samples, family)} | of_slice
    return {name: _latency(buckets) for name, buckets in found.items() if sum(buckets.values()) > 0}


def _latency(buckets: Mapping[float, float]) -> Latency:
    p50, p95, p99 = (quantile(buckets, share) for share in SHARES)
    return Latency(round(sum(buckets.values())), p50, p95, p99, dict(buckets))


def _buckets(samples: Samples, family: str, **where: str) -> dict[float, float]:
    """Counts by upper bound, of all processes together."""
    upto: dict[float, float] = {}
    for labels, value in samples.of(f"{family}_bucket", **where).items():
        bound = float(dict(labels)["le"])
        upto[bound] = upto.get(bound, 0.0) + value
    counts, below = {}, 0.0
    for bound in sorted(upto):
        counts[bound], below = max(upto[bound] - below, 0.0), upto[bound]
    return counts


def _by(samples: Samples, name: str, label: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for labels, value in samples.of(name).items():
        key = dict(labels).get(label, "")
        sums[key] = sums.get(key, 0.0) + value
    return {key: value for key, value in sorted(sums.items()) if value}


def _memory(samples: Samples) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for labels, size in sorted(samples.of("divisi_memory_bytes").items()):
        free = samples.of("divisi_memory_free_bytes").get(labels)
        if size and free is not None:
            named = dict(labels)
            entry = found.setdefault(f"worker {named.get('worker', '?')} {named['pool']}", {})
            entry["bytes"], entry["free"] = size, free / size
    return found


def _acceptance(samples: Samples) -> dict[str, float]:
    drafted = _by(samples, "divisi_drafted_tokens_total", "position")
    accepted = _by(samples, "divisi_accepted_tokens_total", "position")
    if not drafted:
        return {}
    shares = {position: accepted.get(position, 0.0) / count for position, count in drafted.items()}
    return {"all": sum(accepted.values()) / sum(drafted.values())} | shares


def _imbalance(samples: Samples) -> float | None:
    """Of ranks that hold a share of the experts: those that hold all have none."""
    ranks: dict[str, float] = {}
    for labels, rows in samples.of("divisi_expert_tokens_total").items():
        instance = dict(labels).get("instance", "")
        ranks[instance] = ranks.get(instance, 0.0) + rows
    total = sum(ranks.values())
    return max(ranks.values()) * len(ranks) / total if total and len(ranks) > 1 else None
