"""Numbers that the SDK's instruments are too slow for, or that are kept elsewhere, as the SDK's metric data.

A record of an SDK instrument takes 6 to 7 us of a Python thread, an observation here 0.1 us. The specification has a
`MetricProducer` for such numbers, the Python SDK none: readers and exporters are given `Produced` to append.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    Sum,
)

from divisi.cluster.telemetry.conventions import DIVISI
from divisi.cluster.telemetry.rows import StatRow

Producer = Callable[[], Iterable[Metric]]
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class BucketCounts:
    """Observations of one label value. One thread observes, others read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, in seconds; `times`: as if it came so often."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times


class BatchHistogram:
    """A histogram in seconds with one label, whose values are known beforehand."""

    def __init__(self, name: str, description: str, bounds: Sequence[float], label: str, values: Iterable[str]) -> None:
        """`name` is without its unit; `bounds` ascend."""
        self._name, self._description, self._bounds, self._label = name, description, bounds, label
        self._of = {value: BucketCounts(bounds) for value in values}
        self._since = time.time_ns()

    def of(self, value: str) -> BucketCounts:
        """The observations under a label value."""
        return self._of[value]

    def metric(self) -> Metric:
        """As the SDK's data."""
        points = [self._point(value, of) for value, of in self._of.items()]
        return Metric(self._name, self._description, "s", Histogram(points, _CUMULATIVE))

    def _point(self, value: str, of: BucketCounts) -> HistogramDataPoint:
        counts, now = list(of.counts), time.time_ns()
        # Least and most are not kept; the exporters want numbers.
        attributes = {self._label: value}
        return HistogramDataPoint(
            attributes, self._since, now, sum(counts), of.sum, counts, self._bounds, 0.0, float(self._bounds[-1])
        )


def metrics_of(rows: Iterable[StatRow], since: int) -> list[Metric]:
    """Rows as the SDK's data; `since`: when their counters were 0, in nanoseconds of the epoch."""
    families: dict[str, list[StatRow]] = {}
    for row in rows:
        families.setdefault(row.name, []).append(row)
    return [_family(found, since) for found in families.values()]


def _family(rows: Sequence[StatRow], since: int) -> Metric:
    first, now = rows[0], time.time_ns()
    points = [NumberDataPoint(dict(row.labels), since, now, row.value) for row in rows]
    data: Sum | Gauge = Sum(points, _CUMULATIVE, is_monotonic=True) if first.kind == "counter" else Gauge(points)
    return Metric(f"{DIVISI}_{first.name}", first.help, "", data)


class Produced:
    """Adds what producers make to what the SDK has collected."""

    def __init__(self) -> None:
        self.producers: list[Producer] = []

    def __call__(self, data: MetricsData) -> MetricsData:
        """The data with more in its first scope: exporters keep but one of two scopes that are alike."""
        made = [metric for produce in self.producers for metric in produce()]
        first, *others = data.resource_metrics
        scope, *scopes = first.scope_metrics
        grown = replace(scope, metrics=[*scope.metrics, *made])
        return MetricsData([replace(first, scope_metrics=[grown, *scopes]), *others])
