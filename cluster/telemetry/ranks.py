"""What each kind of process shows: puts its metrics, its spans and the loop's observer together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Protocol

from divisi.cluster.engine.stats import EngineStats
from divisi.cluster.gang.control.header import Header
from divisi.cluster.gang.membership.status import Stats
from divisi.cluster.telemetry.process import Telemetry
from divisi.cluster.telemetry.requests import RequestTimes
from divisi.cluster.telemetry.rows import StatRow, rank_rows
from divisi.cluster.telemetry.steps import ShardSteps, StepSpans, WorkerSteps

_MEASURED_EVERY = 16
"""Steps between those in which the rows of experts are counted; counting takes 10 us a layer."""


class Meter(Protocol):
    """The meter of a rank's experts; see `divisi.cluster.dispatch.meter.MeteredExperts`."""

    measuring: bool
    seconds: float

    def stats(self) -> Mapping[str, Mapping[str, float]]:
        """Rows by layer, and how unevenly the experts share them."""
        ...


class Worker(Protocol):
    """An attention worker."""

    @property
    def seat(self) -> object:
        """The seat held now."""
        ...

    def step_seconds(self) -> Mapping[str, float]:
        """Time in steps by part, so far. For the step loop's thread."""
        ...

    def stats(self) -> Stats:
        """All numbers, from any thread."""
        ...


class WorkerStats:
    """An engine's numbers, with the bytes that pages and slots stand for."""

    def __init__(self, bytes_per_page: int, bytes_per_slot: int) -> None:
        self._per_page, self._per_slot = bytes_per_page, bytes_per_slot
        self.last: Stats = {}

    def told(self, stats: EngineStats) -> Stats:
        """As rows have them; also the last from now on."""
        self.last = dataclasses.asdict(stats) | {
            "memory_bytes": self._bytes(stats.total_pages, stats.total_slots),
            "memory_free_bytes": self._bytes(stats.free_pages, stats.free_slots),
        }
        return self.last

    def _bytes(self, pages: int, slots: int) -> Mapping[str, float]:
        return {"kv": float(pages * self._per_page), "state": float(slots * self._per_slot)}


class _Rows:
    """Iterating asks anew."""

    def __init__(self, *sources: Callable[[], Stats]) -> None:
        self._sources = sources

    def __iter__(self) -> Iterator[StatRow]:
        for source in self._sources:
            yield from rank_rows(source())


def show_worker(telemetry: Telemetry, meter: Meter | None, worker: Worker) -> WorkerSteps:
    """Show an attention worker's numbers; returns its loop's observer. `meter` is that of the experts that it holds."""
    spec, requests = telemetry.spec, RequestTimes(telemetry.tracer)
    spans = StepSpans(telemetry.tracer, spec.step_ratio, lambda: worker.seat, worker.step_seconds)
    steps = WorkerSteps(requests, spans, None if meter is None else measuring(meter))
    telemetry.metrics.show(requests.queue, requests.prefill, steps.duration)
    telemetry.metrics.show_rows(_Rows(worker.stats, *(() if meter is None else (meter.stats,))))
    return steps


def show_shard(telemetry: Telemetry, meter: Meter, seat: str, weights: Stats) -> ShardSteps:
    """Show an expert shard's numbers; returns its loop's observer."""

    def seconds() -> Mapping[str, float]:
        # What is not spent in experts is waiting for rows, or for room to send them back.
        return {"experts": meter.seconds, "wait": perf_counter() - meter.seconds}

    telemetry.metrics.show_rows(_Rows(lambda: weights, meter.stats))
    return ShardSteps(StepSpans(telemetry.tracer, 0.0, lambda: seat, seconds), measuring(meter))


def show_coordinator(telemetry: Telemetry, numbers: Callable[[], Stats]) -> None:
    """Show the gang's seats and epochs."""
    telemetry.metrics.show_rows(_Rows(numbers))


def measuring(meter: Meter) -> Callable[[Header], None]:
    """Has the experts counted in some steps, and in those that are sampled for spans."""

    def measure(header: Header) -> None:
        meter.measuring = bool(header.trace) or header.step % _MEASURED_EVERY == 0

    return measure
