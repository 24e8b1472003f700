"""Tells the coordinator that an ingress replica is there, and learns its number. Imports no torch."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
from ray.exceptions import RayError

from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.ray.coordinator import find_coordinator

_EVERY_S = 5.0
_ANSWER_S = 5.0


class Presence:
    """A thread that says so every few seconds, to whichever coordinator there is."""

    def __init__(self, gang: str, ingress_id: str, host: str, port: int) -> None:
        """`gang` is the name of the coordinator's actor; `port` is where the process is scraped, 0: nowhere."""
        self._gang, self._target = gang, (ingress_id, host, port)
        self.ordinal: int | None = None
        """A small number that no other replica has; None before the coordinator has given one."""

    def start(self) -> None:
        """Begin; it ends with the process."""
        threading.Thread(target=self._run, name="presence", daemon=True).start()

    def _run(self) -> None:
        wait = threading.Event()
        while True:
            with contextlib.suppress(CoordinatorLost, RayError):
                coordinator: Any = find_coordinator(self._gang)
                reply: Any = coordinator.register_ingress.remote(*self._target, self.ordinal)
                self.ordinal = ray.get(reply, timeout=_ANSWER_S)
            wait.wait(_EVERY_S if self.ordinal is not None else 1.0)
