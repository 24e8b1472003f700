"""Processor time by part of a server: of its processes from outside, and inside the attention worker by thread."""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil

PARTS = {"AttentionWorker": "worker", "ExpertShard": "shards", "Ingress": "ingress", "Proxy": "front", "proxy": "front"}
"""By a word in the command line of a process, the first that fits. All else of the server is `other`."""

_FIELDS = struct.Struct("4q")
_HELPERS = "engine"
"""The name that threads have which the engine's own thread starts while it runs a step: OpenMP's."""
_Answer = TypeVar("_Answer")


class EngineClock:
    """In the worker's process: keeps the time of an engine's thread and its helpers in a file for others to read."""

    def __init__(self) -> None:
        path = _path(os.getpid())
        path.write_bytes(bytes(_FIELDS.size))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _FIELDS.size)
        self._plan_ns = self._run_ns = 0
        self._helpers: list[int] = []

    def watch(self, engine: Any) -> Any:
        """The engine, with clocks around what its loop calls in each step. For one thread."""
        run_pass, commit, plan = engine.run_pass, engine.commit, engine.plan

        def first_pass(*arguments: Any) -> Any:
            _name_thread(_HELPERS)  # a new thread has its maker's name
            try:
                return self._timed_run(run_pass, *arguments)
            finally:
                _name_thread("step-loop")
                self._helpers = _threads_named(_HELPERS)
                engine.run_pass = lambda *arguments: self._timed_run(run_pass, *arguments)

        def timed_plan() -> Any:
            started = time.thread_time_ns()
            try:
                return plan()
            finally:
                self._plan_ns += time.thread_time_ns() - started

        def timed_commit(*arguments: Any) -> Any:
            events = self._timed_run(commit, *arguments)
            self._publish()
            return events

        engine.run_pass, engine.commit, engine.plan = first_pass, timed_commit, timed_plan
        return engine

    def _timed_run(self, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
        started = time.thread_time_ns()
        try:
            return function(*arguments)
        finally:
            self._run_ns += time.thread_time_ns() - started

    def _publish(self) -> None:
        helpers = sum(map(_thread_ns, self._helpers))
        _FIELDS.pack_into(self._shared, 0, self._run_ns, helpers, self._plan_ns, time.thread_time_ns())


def read_clocks(server: int) -> dict[str, float]:
    """Seconds so far by part of the server whose first process is `server`.

    `worker` is parted in `engine` (its thread in steps and its helpers), `plan`, `loop` (the rest of that thread) and
    `threads` (all others). A process that ends takes its time along.
    """
    found = dict.fromkeys(("engine", "plan", "loop", "threads", "shards", "ingress", "front", "other"), 0.0)
    first = psutil.Process(server)
    for process in (first, *first.children(recursive=True)):
        try:
            words = " ".join(process.cmdline()) or process.name()
            seconds = time.clock_gettime_ns((~process.pid << 3) | 2) / 1e9
        except (psutil.Error, OSError):
            continue
        part = next((part for word, part in PARTS.items() if word in words), "other")
        path = _path(process.pid)
        if part != "worker":
            found[part] += seconds
        elif path.exists():
            run, helpers, plan, loop = (ns / 1e9 for ns in _FIELDS.unpack(path.read_bytes()))
            found["engine"] += run + helpers
            found["plan"] += plan
            found["loop"] += loop - run - plan
            found["threads"] += seconds - loop - helpers
        else:
            found["engine"] += seconds
    return found


def forget_clocks(server: int) -> None:
    """Remove the files of a server's workers."""
    first = psutil.Process(server)
    for process in (first, *first.children(recursive=True)):
        _path(process.pid).unlink(missing_ok=True)


def _path(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"divisi-bench-clock-{os.geteuid()}-{pid}"


def _thread_ns(thread: int) -> int:
    """Of a thread of this process, whoever made it: its clock's number is made of its id."""
    return time.clock_gettime_ns((~thread << 3) | 6)


def _name_thread(name: str) -> None:
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)


def _threads_named(name: str) -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(task.name) for task in tasks if (task / "comm").read_text().strip() == name]
