"""Where a report's samples come from."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from divisi.cluster.errors import DivisiError
from divisi.deploy.monitoring.prometheus import answer_of

Labels = tuple[tuple[str, str], ...]
_TIMEOUT_S = 10.0
COUNTERS = (
    "divisi_time_to_first_token_seconds_bucket", "divisi_request_duration_seconds_bucket",
    "divisi_inter_token_seconds_bucket", "divisi_completion_tokens_total", "divisi_prompt_tokens_total",
    "divisi_drafted_tokens_total", "divisi_accepted_tokens_total", "divisi_expert_tokens_total",
    "divisi_requests_finished_total", "divisi_stream_gaps_total", "divisi_epochs_total", "divisi_aborted_steps_total",
)  # fmt: skip
GAUGES = (
    "divisi_memory_bytes", "divisi_memory_free_bytes", "divisi_expert_busiest_ratio", "divisi_ready",
    "process_resident_memory_bytes",
)  # fmt: skip


class SourceError(DivisiError):
    """The numbers cannot be had; the text says why, and what to do."""


@dataclass
class Samples:
    """Values by name and labels, those of processes told apart; counters as increases over `seconds`."""

    seconds: float
    where: str
    """For people: what they are the numbers of."""
    values: dict[str, dict[Labels, float]] = field(default_factory=dict)
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Courses over time, (seconds before the end, value), where they are known."""

    def add(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """One more."""
        self.values.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def of(self, name: str, **where: str) -> dict[Labels, float]:
        """Those of a name whose labels have these values."""
        wanted = set(where.items())
        return {labels: value for labels, value in self.values.get(name, {}).items() if wanted <= set(labels)}

    def sum(self, name: str, **where: str) -> float:
        """Over all of them; 0 for none."""
        return sum(self.of(name, **where).values())


def scrape(server: str, headers: Mapping[str, str]) -> Samples:
    """All processes of a running server, since each of them began. Raises SourceError."""
    with httpx.Client(timeout=_TIMEOUT_S, headers=dict(headers)) as client:
        targets = _get(client, f"{server}/metrics/targets").json()
    samples = Samples(0.0, f"{server}, since its processes began")
    with httpx.Client(timeout=_TIMEOUT_S) as client:  # the key is the server's, and none of these ask for it
        for group in targets:
            for target in group["targets"]:
                page = _get(client, f"http://{target}/metrics").text
                _take(samples, page, {**group["labels"], "instance": target})
    if not samples.values:
        raise SourceError(f"{server} names no process to scrape; is telemetry.scraped off, or the gang not up yet?")
    return samples


def _take(samples: Samples, page: str, labels: Mapping[str, str]) -> None:
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name in COUNTERS or sample.name in GAUGES:
                samples.add(sample.name, {**sample.labels, **labels}, sample.value)
            if sample.name == "process_start_time_seconds" and labels.get("role") == "ingress":
                samples.seconds = max(samples.seconds, _age(sample.value))


def _age(since: float) -> float:
    return max(time.time() - since, 0.0)


def stored(prometheus: str, seconds: int) -> Samples:
    """What a Prometheus has seen in the last so many seconds. Raises SourceError."""
    samples = Samples(float(seconds), f"{prometheus}, the last {seconds} s")
    with httpx.Client(base_url=prometheus, timeout=_TIMEOUT_S) as client:
        for name in COUNTERS:
            for entry in _query(client, f"increase({name}[{seconds}s])"):
                _add(samples, name, entry)
        for name in GAUGES:
            for entry in _query(client, f"last_over_time({name}[{seconds}s])"):
                _add(samples, name, entry)
        step = max(seconds // 60, 1)
        for title, query in {
            "tokens per second": f"sum(rate(divisi_completion_tokens_total[{4 * step + 20}s]))",
            "running": "sum(divisi_requests_running)",
            "waiting": "sum(divisi_requests_waiting)",
        }.items():
            samples.lines[title] = _course(client, query, seconds, step)
    if not samples.values:
        raise SourceError(f"{prometheus} has no metrics of Divisi in the last {seconds} s; ask for more with --last")
    return samples


def _add(samples: Samples, name: str, entry: Mapping[str, Any]) -> None:
    labels = {key: value for key, value in entry["metric"].items() if key not in ("__name__", "job")}
    samples.add(name, labels, float(entry["value"][1]))


def _query(client: httpx.Client, query: str) -> list[Any]:
    return _ask(client, "/api/v1/query", {"query": query})


def _course(client: httpx.Client, query: str, seconds: int, step: int) -> list[tuple[float, float]]:
    end = time.time()
    found = _ask(client, "/api/v1/query_range", {"query": query, "start": end - seconds, "end": end, "step": step})
    points = [(float(at) - end, float(value)) for entry in found[:1] for at, value in entry["values"]]
    return [point for point in points if math.isfinite(point[1])]


def _ask(client: httpx.Client, path: str, parameters: Mapping[str, str | float]) -> list[Any]:
    reply = _get(client, path, parameters)
    try:
        return answer_of(reply.text)
    except (ValueError, KeyError) as error:
        raise SourceError(f"{client.base_url} does not answer as Prometheus does: {error}") from error


def _get(client: httpx.Client, url: str, parameters: Mapping[str, str | float] | None = None) -> httpx.Response:
    try:
        reply = client.get(url, params=dict(parameters or {}))
        reply.raise_for_status()
    except httpx.HTTPError as error:
        raise SourceError(f"{url} cannot be read: {error}; is it there, and reachable from here?") from error
    return reply
