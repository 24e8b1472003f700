"""What a server tells of itself at one moment, and what has come of it since another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from divisi.deploy.cli.remote import RemoteError, refusal, unreachable

_PREFIX = "divisi_"
_READY = (200, 503)


@dataclass(frozen=True)
class Snapshot:
    """Metrics by name, without the prefix, and labels."""

    at: float
    """Seconds of the monotonic clock."""
    ready: bool
    reason: str
    """Why it is not ready; empty while it is."""
    values: Mapping[str, Mapping[frozenset[tuple[str, str]], float]]

    def sum(self, name: str, **labels: str) -> float | None:
        """Of all that have these labels; None where none has."""
        wanted = set(labels.items())
        found = [value for has, value in self.values.get(name, {}).items() if wanted <= has]
        return sum(found) if found else None

    def labels(self, name: str, label: str) -> list[str]:
        """The values of a label, numbers in their order."""
        found = {dict(has)[label] for has in self.values.get(name, {}) if label in dict(has)}
        return sorted(found, key=lambda value: (len(value), value))

    def rate(self, before: Snapshot | None, name: str, **labels: str) -> float | None:
        """Of a counter, each second since `before`; None where that is another process's, or not known."""
        if before is None or self.at <= before.at:
            return None
        wanted = set(labels.items())
        now = {has: value for has, value in self.values.get(name, {}).items() if wanted <= has}
        then = before.values.get(name, {})
        grown = [value - then.get(has, 0.0) for has, value in now.items()]
        if not then or any(part < 0 for part in grown):
            return None
        return sum(grown) / (self.at - before.at)


def parse(page: str, ready: bool, reason: str, at: float) -> Snapshot:
    """Of a page of metrics."""
    values: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith(_PREFIX):
                by_labels = values.setdefault(sample.name.removeprefix(_PREFIX), {})
                by_labels[frozenset(sample.labels.items())] = sample.value
    return Snapshot(at, ready, reason, values)


def read(client: httpx.Client, server: str) -> Snapshot:
    """Ask a server, by its URL without /v1. Raises RemoteError."""
    health, page = _get(client, f"{server}/v1/health/ready"), _get(client, f"{server}/metrics")
    if health.status_code not in _READY or page.status_code != 200:
        wrong = page if health.status_code in _READY else health
        raise refusal(wrong.status_code, wrong.content, wrong.headers.get("retry-after"))
    return parse(page.text, health.status_code == 200, _reason(health), time.monotonic())


def _get(client: httpx.Client, url: str) -> httpx.Response:
    try:
        return client.get(url)
    except httpx.RequestError as error:
        raise unreachable(error, url) from None


def _reason(health: httpx.Response) -> str:
    try:
        told: Any = health.json()
        return str(told.get("reason", ""))
    except (ValueError, AttributeError):
        raise RemoteError(f"{health.url} is no server of Divisi's: it answers something else") from None
