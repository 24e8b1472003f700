"""The processes of a running server by kind, and what befalls them."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Sequence

import httpx
import psutil

from tests.e2e.chaos.blows import Blow
from tests.e2e.conftest import Cluster, is_shard

_TITLES = {
    "worker": "ServeReplica:divisi:AttentionWorker",
    "shard": "ExpertShardActor",
    "coordinator": "CoordinatorActor",
    "gang": "ServeReplica:divisi:Gang",
    "ingress": "ServeReplica:divisi:Ingress",
}
_OPEN = {
    "worker": r"^divisi_requests_running(?:\{.*\})? (\S+)$",
    "ingress": r"^divisi_http_open_requests(?:\{.*\})? (\S+)$",
}
_SCRAPE_S = 0.5


class Victims:
    """Finds and strikes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.targets: dict[int, str] = {}
        """Host by port, of all that can be scraped."""

    def of(self, kind: str) -> list[psutil.Process]:
        """All there are, by process id."""
        return sorted(self._all()[kind], key=lambda process: process.pid)

    def _all(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in (*_TITLES, "proxy")}
        for process in psutil.Process(self._cluster.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                if process.name() == "haproxy" or "HAProxyManager" in title:
                    found["proxy"].append(process)
                for kind, part in _TITLES.items():
                    if title.startswith("ray::") and part in title and (kind != "shard" or is_shard(process)):
                        found[kind].append(process)
        return found

    def choose(self, blow: Blow) -> list[psutil.Process]:
        """Those that a blow is to strike."""
        there = self.of(blow.kind)
        first = int(blow.draw * len(there))
        return [*there[first:], *there[:first]][: blow.count]

    def living_workers(self, since_s: float, now: float) -> int:
        """Attention workers that run and have done so for a while; `now` is the wall clock."""
        living = 0
        for process in self.of("worker"):
            with contextlib.suppress(psutil.NoSuchProcess):
                living += process.status() != psutil.STATUS_STOPPED and now - process.create_time() >= since_s
        return living

    def open_streams(self, kind: str, struck: Sequence[psutil.Process]) -> int | None:
        """How many streams are theirs, by what they say themselves; None for those on whom all streams depend."""
        if kind not in _OPEN:
            return None
        return sum(self._ask(process, _OPEN[kind]) for process in struck)

    def _ask(self, process: psutil.Process, pattern: str) -> int:
        try:
            listening = {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            return 0
        for port in listening & self.targets.keys():
            with contextlib.suppress(httpx.HTTPError):
                page = httpx.get(f"http://{self.targets[port]}:{port}/metrics", timeout=_SCRAPE_S).text
                return int(sum(float(value) for value in re.findall(pattern, page, re.MULTILINE)))
        return 0


def strike(struck: Sequence[psutil.Process], kills: bool) -> None:
    """Kill or stop them."""
    for process in struck:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL if kills else signal.SIGSTOP)


def let_go(struck: Sequence[psutil.Process]) -> None:
    """Continue those that were stopped and are still there."""
    for process in struck:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
