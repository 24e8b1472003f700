"""Loading a rank's weights with progress that people can follow, and failures that they get to read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import ray
import torch

from divisi.cluster.cores import usable_cores
from divisi.cluster.gang.coordinator import CoordinatorLost
from divisi.cluster.ray.coordinator import RayCoordinatorClient
from divisi.cluster.spec import GangSpec

_Made = TypeVar("_Made")
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


def load_in_thread(spec: GangSpec, load: Callable[[], _Made]) -> _Made:
    """What `load` returns, done in a thread that then ends, and with it the OpenMP threads that computed for it.

    They would wait for more as long as that thread lives. Where a process has more threads than cores, counted over
    all of these, OpenMP's wait by sleeping: those of the step loop would wake each other a hundred times in a step.

    Which ranks run beside this one is not known yet: it takes what it could have if all did; see `CoreShare`.
    """

    def work() -> _Made:
        torch.set_num_threads(spec.threads or max(usable_cores() // spec.shape.size, 1))  # it starts them
        return load()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


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
