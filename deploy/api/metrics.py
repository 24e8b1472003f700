"""What `/metrics` shows: HTTP and token counters of this process, and the engine's rows. Prometheus text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from divisi.deploy.api.engine_client import GangStatus, StatRow
from divisi.deploy.limits import Gate

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
CLIENT_LEFT = 499
"""Status counted for a client that left before the answer was complete (nginx's number for it)."""


class Metrics:
    """The metrics of one app, in a registry of its own.

    Behind a load balancer a scrape meets any replica of the ingress, and each counts its own requests: with `ingress`,
    the replica's name, every row says whose it is, so that one replica's counter is never taken for another's.
    """

    def __init__(self, ingress: str | None = None) -> None:
        self._ingress = ingress
        self._registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "divisi_http_requests", "HTTP requests.", ("path", "method", "status"), registry=registry
        )
        self.open_requests = Gauge("divisi_http_open_requests", "HTTP requests being answered.", registry=registry)
        self.prompt_tokens = Counter(
            "divisi_prompt_tokens", "Tokens of the prompts that were answered.", registry=registry
        )
        self.completion_tokens = Counter("divisi_completion_tokens", "Generated tokens.", registry=registry)
        self.finished = Counter("divisi_requests_finished", "Answers by finish reason.", ("reason",), registry=registry)
        self.first_token = Histogram(
            "divisi_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            registry=registry,
            buckets=_FIRST_TOKEN_BUCKETS,
        )
        self.per_token = Histogram(
            "divisi_time_per_output_token_seconds",
            "Mean time between tokens of an answer, after the first.",
            registry=registry,
            buckets=_PER_TOKEN_BUCKETS,
        )
        self.duration = Histogram(
            "divisi_request_duration_seconds",
            "From a generation request's arrival to the end of its answer.",
            ("endpoint",),
            registry=registry,
            buckets=_DURATION_BUCKETS,
        )

        self._dropped_keys = Counter(
            "divisi_dropped_keys",
            "Keys without a meaning here that clients sent back in conversations and tools.",
            ("place", "key"),
            registry=registry,
        )

    def count_dropped(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Keys that a request lost, by place and label (`body.replayed.KNOWN_DROPPED`, or `other`)."""
        for (place, key), count in counts.items():
            self._dropped_keys.labels(place, key).inc(count)

    def watch(self, gate: Gate) -> None:
        """Show what is inside the gate."""
        answers = Gauge("divisi_admitted_requests", "Answers let in and unfinished.", registry=self._registry)
        answers.set_function(lambda: gate.answers)
        tokens = Gauge(
            "divisi_admitted_queued_tokens",
            "Prompt tokens let in whose answers have not begun.",
            registry=self._registry,
        )
        tokens.set_function(lambda: gate.queued_tokens)

    def render(self, status: GangStatus) -> bytes:
        """The whole page."""
        own = self._registry
        if self._ingress is not None:
            own = CollectorRegistry()
            own.register(_Labelled(self._registry, self._ingress))
        engine = CollectorRegistry()
        engine.register(_EngineRows(status))
        return generate_latest(own) + generate_latest(engine)


class RequestClock:
    """Times one generation request; `close` records it."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._start = perf_counter()
        self._first: float | None = None
        self._last = self._start
        self._tokens = 0
        self._tokens_after_first = 0

    @property
    def tokens(self) -> int:
        """Tokens that have come."""
        return self._tokens

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first token; None before it."""
        return None if self._first is None else self._first - self._start

    def tick(self, tokens: int) -> None:
        """So many tokens have come."""
        if not tokens:
            return
        self._last = perf_counter()
        if self._first is None:
            self._first = self._last
            self._metrics.first_token.observe(self._first - self._start)
        else:
            self._tokens_after_first += tokens
        self._tokens += tokens

    def close(self, prompt_tokens: int, reasons: Iterable[str]) -> None:
        """The request is over, one reason per choice: a finish reason, `cancelled`, `refused` or `error`."""
        metrics = self._metrics
        metrics.prompt_tokens.inc(prompt_tokens)
        metrics.completion_tokens.inc(self._tokens)
        for reason in reasons:
            metrics.finished.labels(reason).inc()
        if self._first is not None and self._tokens_after_first:
            metrics.per_token.observe((self._last - self._first) / self._tokens_after_first)
        metrics.duration.labels(self._endpoint).observe(perf_counter() - self._start)


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

        self._metrics.open_requests.inc()
        try:
            await self._app(scope, receive, counting_send)
        finally:
            self._metrics.open_requests.dec()
            # Only templates and known methods become labels: clients must not be able to grow the registry.
            path = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_requests.labels(path, method, str(status)).inc()


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
