"""Whether Ray's head can be reached: a process that has lost it for good ends, or it would stay for ever. No torch."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

import ray

log = logging.getLogger(__name__)

GONE_S = 45.0
"""A head that is restarted is back before; Ray itself gives up after 60 s."""
_EVERY_S = 2.0


def end_without_head() -> None:
    """From now on, end this process once the head was out of reach for `GONE_S`. To be called in each actor.

    Calls of Ray wait without end for a head that is gone, so that nothing else in a process can be relied on.
    """
    address = ray.get_runtime_context().gcs_address
    threading.Thread(target=watch, args=(address, GONE_S, _end), name="head", daemon=True).start()


def watch(address: str, gone_s: float, end: Callable[[], None], every_s: float = _EVERY_S) -> None:
    """Connect to `host:port` now and then; call `end` and return once that has failed for so long."""
    host, _, port = address.rpartition(":")
    reached, pause = time.monotonic(), threading.Event()
    while time.monotonic() - reached < gone_s:
        begin = time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=every_s).close()
            reached = begin
        except OSError as error:
            log.info("Ray's head at %s cannot be reached: %s", address, error)
        pause.wait(every_s)
    end()


def _end() -> None:
    log.warning("Ray's head was not reached for %g s; this process ends", GONE_S)
    os._exit(1)
