"""What an HTTP process counts and times, and what `/metrics` shows of it and of the gang."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from time import perf_counter

from opentelemetry.metrics import CallbackOptions, Observation
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.cluster.telemetry import conventions as names
from divisi.cluster.telemetry.batches import BatchHistogram
from divisi.cluster.telemetry.process import ProcessMetrics, Telemetry
from divisi.cluster.telemetry.rows import StatRow
from divisi.cluster.telemetry.slices import SLICES, Slice
from divisi.cluster.telemetry.spec import TelemetrySpec
from divisi.deploy.api.engine_client import GangStatus
from divisi.deploy.limits import Gate

# Steps of 1.3 to 2, so that a percentile that is read from a bucket says something.
FIRST_TOKEN_BUCKETS = (
    0.005, 0.0075, 0.01, 0.015, 0.025, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 5.0,
    7.5, 10.0, 15.0, 30.0, 60.0, 120.0,
)  # fmt: skip
PER_TOKEN_BUCKETS = (
    0.001, 0.0015, 0.0025, 0.0035, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25,
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
DURATION_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 3.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0,
    45.0, 60.0, 120.0, 300.0, 600.0,
)  # fmt: skip
GAP_S = 1.0
"""A stream that shows nothing new for so long between two tokens has a gap."""
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_REASONS = ("stop", "length", "tool_calls", "cancelled", "refused", "error", "timeout", "stopped")
CLIENT_LEFT = 499
"""Status counted for a client that left before the answer was complete (nginx's number for it)."""
_OPERATIONS = {"chat": names.CHAT, "completion": names.TEXT_COMPLETION}


class Metrics:
    """The metrics of one app. They start at 0, so that the first of a kind is seen as an increase."""

    def __init__(self, process: ProcessMetrics | None = None, model: str = names.DIVISI) -> None:
        """Without `process`, in a registry that nobody else sees; `model` is the name that replies have."""
        self._process = process or Telemetry(TelemetrySpec(scraped=False), "ingress").metrics
        self._model = model
        meter = self._process.meter
        self.http_requests = meter.create_counter("divisi_http_requests", "", "HTTP requests.")
        self.open_requests = meter.create_up_down_counter(
            "divisi_http_open_requests", "", "HTTP requests being answered."
        )
        self.prompt_tokens = meter.create_counter(
            "divisi_prompt_tokens", "", "Tokens of the prompts that were answered."
        )
        self.completion_tokens = meter.create_counter("divisi_completion_tokens", "", "Generated tokens.")
        self.finished = meter.create_counter("divisi_requests_finished", "", "Answers by finish reason.")
        self.gaps = meter.create_counter(
            "divisi_stream_gaps", "", f"Times that an answer stood still for {GAP_S:g} s or more after its first token."
        )
        self._dropped_keys = meter.create_counter(
            "divisi_dropped_keys", "", "Keys without a meaning here that clients sent back in conversations and tools."
        )
        self.first_token = _by_slice(
            "divisi_time_to_first_token", "From the request's arrival to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.per_token = _by_slice(
            "divisi_time_per_output_token", "Mean time between tokens of an answer, after the first.", PER_TOKEN_BUCKETS
        )
        self.inter_token = _by_slice(
            "divisi_inter_token", "Time between two tokens of an answer, as they come.", PER_TOKEN_BUCKETS
        )
        self.duration = _by_slice(
            "divisi_request_duration", "From a generation request's arrival to the end of its answer.", DURATION_BUCKETS
        )
        self._process.show(self.first_token, self.per_token, self.inter_token, self.duration)
        self._gen_ai = tuple(
            meter.create_histogram(name, "s", told, explicit_bucket_boundaries_advisory=bounds)
            for name, told, bounds in (
                (names.SERVER_REQUEST_DURATION, "Duration of requests.", DURATION_BUCKETS),
                (names.SERVER_TIME_TO_FIRST_TOKEN, "Time to the first token.", FIRST_TOKEN_BUCKETS),
                (names.SERVER_TIME_PER_OUTPUT_TOKEN, "Time per token after the first.", PER_TOKEN_BUCKETS),
            )
        )
        for counter in (self.open_requests, self.prompt_tokens, self.completion_tokens, self.gaps):
            counter.add(0)
        for reason in _REASONS:
            self.finished.add(0, {"reason": reason})

    def count_dropped(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Keys that a request lost, by place and label (`body.replayed.KNOWN_DROPPED`, or `other`)."""
        for (place, key), count in counts.items():
            self._dropped_keys.add(count, {"place": place, "key": key})

    def watch(self, gate: Gate) -> None:
        """Show what is inside the gate."""
        self._observe("divisi_admitted_requests", "Answers let in and unfinished.", lambda: gate.answers)
        told = "Prompt tokens let in whose answers have not begun."
        self._observe("divisi_admitted_queued_tokens", told, lambda: gate.queued_tokens)

    def _observe(self, name: str, told: str, read: Callable[[], float]) -> None:
        def observe(_: CallbackOptions) -> list[Observation]:
            return [Observation(read())]

        self._process.meter.create_observable_gauge(name, [observe], "", told)

    def observe_gen_ai(self, endpoint: str, duration_s: float, first_s: float | None, per_s: float | None) -> None:
        """The same times under the names of the conventions for generative AI."""
        labels = {
            names.OPERATION: _OPERATIONS[endpoint], names.PROVIDER: names.DIVISI, names.REQUEST_MODEL: self._model,
        }  # fmt: skip
        for histogram, seconds in zip(self._gen_ai, (duration_s, first_s, per_s), strict=True):
            if seconds is not None:
                histogram.record(seconds, labels)

    def render(self, status: GangStatus, ordinal: str | None = None) -> bytes:
        """The whole page. Behind a load balancer a scrape meets any replica of the ingress, and each counts its own
        requests: with `ordinal`, the replica's, every row of its own says whose it is.
        """
        own = self._process.registry
        if ordinal is not None:
            own = CollectorRegistry()
            own.register(_Labelled(self._process.registry, ordinal))
        engine = CollectorRegistry()
        engine.register(_EngineRows(status))
        return generate_latest(own) + generate_latest(engine)


def _by_slice(name: str, told: str, bounds: tuple[float, ...]) -> BatchHistogram:
    return BatchHistogram(name, told, bounds, "slice", SLICES)


class RequestClock:
    """Times one generation request; `close` records it. All instants are of `perf_counter`."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self.slice: Slice = "chat"
        self.start = perf_counter()
        self.admitted: float | None = None
        """When it was let in."""
        self.first: float | None = None
        """When its first token came."""
        self.last = self.start
        """When its last token came, so far."""
        self.detokenising_s = 0.0
        """Time spent on turning its tokens into text, where anybody wants to know."""
        self.tokens = 0
        """Tokens that have come."""
        self._gaps = metrics.inter_token.of(self.slice)
        self._last_of: dict[int, float] = {}

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first token; None before it."""
        return None if self.first is None else self.first - self.start

    def admit(self, found: Slice) -> None:
        """It is let in, and known to belong to a slice."""
        self.admitted, self.slice = perf_counter(), found
        self._gaps = self._metrics.inter_token.of(found)

    def tick(self, tokens: int, choice: int = 0) -> None:
        """So many tokens of a choice have come."""
        if not tokens:
            return
        self.last = now = perf_counter()
        self.tokens += tokens
        former = self._last_of.get(choice)
        self._last_of[choice] = now
        if self.first is None:
            self.first = now
            self._metrics.first_token.of(self.slice).observe(now - self.start)
        if former is not None:
            self._gaps.observe((now - former) / tokens, tokens)
            if now - former >= GAP_S:
                self._metrics.gaps.add(1)

    def close(self, prompt_tokens: int, reasons: Iterable[str]) -> None:
        """The request is over, one reason per choice: a finish reason, `cancelled`, `refused` or `error`."""
        metrics, per_token = self._metrics, None
        metrics.prompt_tokens.add(prompt_tokens)
        metrics.completion_tokens.add(self.tokens)
        for reason in reasons:
            metrics.finished.add(1, {"reason": reason})
        if self.first is not None and self.tokens > 1 and self.last > self.first:
            per_token = (self.last - self.first) / (self.tokens - 1)
            metrics.per_token.of(self.slice).observe(per_token)
        duration = perf_counter() - self.start
        metrics.duration.of(self.slice).observe(duration)
        metrics.observe_gen_ai(self._endpoint, duration, self.first_token_s, per_token)


class CountRequests:
    """ASGI middleware: counts every request under its route's template and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.open_requests.add(1)
        try:
            await self._app(scope, receive, counting_send)
        finally:
            self._metrics.open_requests.add(-1)
            # Only templates and known methods become labels: clients must not be able to grow the registry.
            path = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_requests.add(1, {"path": path, "method": method, "status": str(status)})


class _Labelled(Collector):
    """A registry's rows with the label `ingress`."""

    def __init__(self, registry: CollectorRegistry, ingress: str) -> None:
        self._registry, self._ingress = registry, ingress

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            labelled = Metric(family.name, family.documentation, family.type, family.unit)
            labelled.samples = [
                sample._replace(labels=sample.labels | {"ingress": self._ingress}) for sample in family.samples
            ]
            yield labelled


class _EngineRows(Collector):
    """A status as metric families."""

    def __init__(self, status: GangStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        ready = GaugeMetricFamily("divisi_ready", "1 when the gang can serve.")
        ready.add_metric((), float(self._status.ready))
        yield ready
        families: dict[str, list[StatRow]] = {}
        for row in self._status.stats:
            families.setdefault(row.name, []).append(row)
        for name, rows in families.items():
            kind = CounterMetricFamily if rows[0].kind == "counter" else GaugeMetricFamily
            labels = [label for label, _ in rows[0].labels]
            family = kind(f"divisi_{name}", rows[0].help or name, labels=labels)
            for row in rows:
                values = dict(row.labels)
                family.add_metric([values.get(label, "") for label in labels], row.value)
            yield family
