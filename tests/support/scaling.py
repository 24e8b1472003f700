"""How a server's attention workers come and go, by its metrics and its log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from divisi.cluster.gang.control.mesh import CHANGES
from divisi.deploy.cli.remote import RemoteError
from divisi.deploy.cli.top.snapshot import Snapshot, read
from divisi.deploy.routing import TOKENS_PER_REQUEST

_EVERY_S = 0.25
_LOADED = re.compile(r"loaded after ([\d.]+) s, of which imports ([\d.]+) s")
_MET = re.compile(r"epoch \d+: (shared memory|gloo) with")


class Watch:
    """What the server tells of itself, four times a second."""

    def __init__(self, url: str) -> None:
        self._url, self._ends = url, threading.Event()
        self.seen: list[Snapshot] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self._ends.wait(_EVERY_S):
                with suppress(RemoteError):
                    self.seen.append(read(client, self._url))

    def close(self) -> None:
        self._ends.set()
        self._thread.join(20)

    def workers(self) -> int:
        """That serve now."""
        return serving(self.seen[-1]) if self.seen else 0

    def first(self, condition: Callable[[Snapshot], bool], since: float = 0.0) -> float:
        """When it was first so; time is what `Snapshot.at` is in."""
        return next(seen.at for seen in self.seen if seen.at >= since and condition(seen))

    def last(self, condition: Callable[[Snapshot], bool]) -> float:
        """When it was last so."""
        return next(seen.at for seen in reversed(self.seen) if condition(seen))


def serving(seen: Snapshot) -> int:
    """Workers in the epoch that serves."""
    return len(seen.labels("requests_running", "worker"))


def waiting(seen: Snapshot) -> float:
    """Tokens, as the policy counts them."""
    unfinished = sum(seen.sum(name) or 0.0 for name in ("requests_running", "requests_waiting"))
    queued, turned_away = (seen.sum(name) or 0.0 for name in ("queued_tokens", "refused_tokens"))
    return queued + TOKENS_PER_REQUEST * unfinished + turned_away


def bench(url: str, folder: Path, seconds: float, *load: str) -> dict[str, Any]:
    """What `divisi bench` has measured in so many seconds."""
    report = folder / "bench.json"
    command = [sys.executable, "-m", "divisi.deploy.cli", "bench", "--base-url", f"{url}/v1", "--quiet", *load]
    command += ["--duration", str(seconds), "--input-tokens", "32", "--output-tokens", "64"]
    command += ["--json", str(report), "--records"]
    subprocess.run(command, check=True, timeout=seconds + 60, stdout=subprocess.DEVNULL)
    return dict(json.loads(report.read_text()))


@dataclass(frozen=True)
class ServerLog:
    """What the server has written; times in seconds of the monotonic clock."""

    lines: list[tuple[float, str, str]]
    """When, which process, and what."""

    @classmethod
    def read(cls, folder: Path) -> ServerLog:
        """Of the one server whose state folder is there."""
        (log,) = folder.glob("serve-*.log")
        ahead = time.time() - time.monotonic()
        told = [json.loads(line) for line in log.read_text().splitlines()]
        return cls([(_seconds(line["time"]) - ahead, line["process"], line["message"]) for line in told])

    def changes(self, leader: psutil.Process, since: float) -> list[tuple[float, float]]:
        """When epochs ended for others to come or go, and when all had met in the next."""
        own = [(at, said) for at, process, said in self.lines if process == f"attention:{leader.pid}" and at >= since]
        ends = [at for at, said in own if said.endswith(CHANGES)]
        return [(end, next(at for at, said in own if at >= end and _MET.search(said))) for end in ends]

    def parts(self, newcomer: psutil.Process, marked: float) -> dict[str, float]:
        """What a worker's coming consists of, from the moment at which the queue passed its mark."""
        own = [(at, said) for at, process, said in self.lines if process == f"attention:{newcomer.pid}"]
        loaded_at, loaded = next((at, found) for at, said in own if (found := _LOADED.search(said)))
        met_at = next(at for at, said in own if _MET.search(said))
        load_s, import_s = map(float, loaded.groups())
        began_at = newcomer.create_time() - time.time() + time.monotonic()
        return {
            "decision": began_at - marked,
            "process": loaded_at - load_s - began_at,
            "imports": import_s,
            "load": load_s - import_s,
            "epoch": met_at - loaded_at,
        }


def _seconds(written: str) -> float:
    return datetime.fromisoformat(written).timestamp()
