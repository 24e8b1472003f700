"""How a rank's loading is told: progress that people can follow, and failures that they get to read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import ray

from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.ray.coordinator import RayCoordinatorClient

_EVERY_S = 0.5
_FIND_S = 120.0


@dataclass
class LoadReport:
    """Sends the bytes read so far to the coordinator, twice a second at most."""

    client: RayCoordinatorClient
    who: str
    sent_at: float = 0.0

    def __call__(self, bytes_read: int) -> None:
        """Note the bytes read so far."""
        now = time.monotonic()
        if now - self.sent_at >= _EVERY_S:
            self.sent_at = now
            self.client.report_progress(self.who, f"{bytes_read / 1e6:,.0f} MB read")


@contextlib.contextmanager
def reported(name: str, who: str) -> Iterator[LoadReport]:
    """Report how a rank's loading ends, well or not."""
    report = LoadReport(_find(name), who)
    report.client.report_progress(who, "loading")
    try:
        yield report
    except Exception as error:  # whatever it was, the person who started the gang has to see it
        report.client.report_failure(who, f"{type(error).__name__}: {error}")
        raise
    report.client.report_progress(who, "loaded")


def own_host() -> str:
    """The address that peers reach this process at."""
    host: str = ray.util.get_node_ip_address()
    return host


def _find(name: str) -> RayCoordinatorClient:
    """Workers and the gang are deployed side by side, so that the coordinator may come a little later."""
    until = time.monotonic() + _FIND_S
    while True:
        try:
            return RayCoordinatorClient(name)
        except CoordinatorLost:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)  # Ray has no way to await a named actor
