"""What a shard's process holds, and the thread that loads other experts as it is told, beside the steps.

It has the lowest priority and one core at most, and goes layer by layer: steps go on meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import Protocol

import torch

from divisi.model.checkpoint import Checkpoint
from divisi.model.config import ModelConfig
from divisi.model.experts import ExpertBank

log = logging.getLogger(__name__)

_RETRY_S = 5.0
_NICE = 19


class Superseded(Exception):
    """There is another order by now, or none any more."""


class Prepared(Protocol):
    """Is told once what an order says is held."""

    def __call__(self, order: int, bytes_read: int) -> None:
        """`bytes_read`: from the checkpoint, for its sake."""
        ...


@dataclass(frozen=True, slots=True)
class _Order:
    number: int
    leaves: frozenset[int]


class Holdings:
    """The virtual shards of one bank. Implements `divisi.cluster.gang.membership.watch.HeldLeaves`."""

    def __init__(self, bank: ExpertBank, model_dir: str, config: ModelConfig, prepared: Prepared) -> None:
        self._bank, self._model_dir, self._config, self._prepared = bank, model_dir, config, prepared
        self._changed = threading.Condition()
        self._order: _Order | None = None
        """What is to be done, or is being done."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="holdings", daemon=True)
        self._thread.start()

    def stand(self) -> frozenset[int]:
        """What is held; what was ordered is void, since whoever asks has not ordered it."""
        with self._changed:
            self._order = None
            return self._bank.held

    def prepare(self, order: int, leaves: frozenset[int]) -> None:
        """Hold these from now on, and no others; returns at once."""
        with self._changed:
            self._order = _Order(order, leaves)
            self._changed.notify_all()

    def close(self) -> None:
        """Load nothing any more."""
        with self._changed:
            self._order, self._closed = None, True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone, on Linux
        torch.set_num_threads(1)
        while (order := self._next()) is not None:
            try:
                bytes_read = self._hold(order)
            except Superseded:
                continue
            except Exception:  # whatever it was: what is held is served as before, and the next try may do
                log.exception("%d virtual shards could not be loaded; trying again", len(order.leaves))
                self._stand_by(order)
                continue
            self._done(order)
            self._prepared(order.number, bytes_read)

    def _next(self) -> _Order | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._order is not None)
            return self._order

    def _stand_by(self, order: _Order) -> None:
        """Unless there is another order."""
        with self._changed:
            self._changed.wait_for(lambda: self._order is not order, _RETRY_S)

    def _hold(self, order: _Order) -> int:
        """Returns the bytes that had to be read."""

        def check(bytes_read: int) -> None:
            if self._order is not order:
                raise Superseded

        with contextlib.closing(Checkpoint.open(self._model_dir)) as checkpoint:
            self._bank.hold(checkpoint, self._config, order.leaves, check)
            return checkpoint.bytes_read

    def _done(self, order: _Order) -> None:
        with self._changed:
            if self._order is order:
                self._order = None
