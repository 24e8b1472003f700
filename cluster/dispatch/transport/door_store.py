"""A rank's end of the store in which the ranks of an epoch meet, as torch wants it."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed

from divisi.cluster.dispatch.transport.rendezvous import CHECK, GET, QUESTION, SET, YES
from divisi.cluster.door import Credentials, DoorError, Line
from divisi.cluster.seats import Address

_dist: Any = torch.distributed  # the stubs lack what a store of one's own overrides


class DoorStore(_dist.Store):  # type: ignore[misc]  # torch has no types for it
    """One rank's end: what gloo and NCCL ask for, of one epoch."""

    def __init__(self, place: Address, epoch: int, credentials: Credentials, timeout_s: float) -> None:
        """Raises RuntimeError, as torch's own stores do, here and elsewhere."""
        super().__init__()
        self._epoch, self._timeout_s = epoch, timeout_s
        self._clone = partial(DoorStore, place, epoch, credentials, timeout_s)
        try:
            self._line = Line(place, credentials.secret, time.monotonic() + timeout_s, credentials.tls)
        except DoorError as error:
            raise RuntimeError(str(error)) from error

    def set(self, key: str, value: str | bytes) -> None:
        """Tell all who ask for it."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._ask(SET, 0.0, f"{key}\0".encode() + data)

    def get(self, key: str) -> bytes:
        """What was told, once it is."""
        answer = self._ask(GET, self._timeout_s, key.encode())
        if answer[:1] != YES:
            raise RuntimeError(f"nobody told {key} within {self._timeout_s:g} s")
        return answer[1:]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all were told."""
        wait_s = self._timeout_s if timeout is None else timeout.total_seconds()
        if not self._look(keys, wait_s):
            raise RuntimeError(f"nobody told one of {', '.join(keys)} within {wait_s:g} s")

    def check(self, keys: list[str]) -> bool:
        """Whether all were told."""
        return self._look(keys, 0.0)

    def clone(self) -> DoorStore:
        """Over a connection of its own, for another thread."""
        return self._clone()

    def close(self) -> None:
        """End the connection."""
        self._line.close()

    def _look(self, keys: list[str], wait_s: float) -> bool:
        return self._ask(CHECK, wait_s, "\0".join(keys).encode())[:1] == YES

    def _ask(self, kind: bytes, wait_s: float, rest: bytes) -> bytes:
        deadline = time.monotonic() + wait_s + self._timeout_s
        try:
            self._line.send(QUESTION.pack(kind, self._epoch, wait_s) + rest, deadline)
            return self._line.receive(deadline)
        except DoorError as error:
            raise RuntimeError(str(error)) from error
