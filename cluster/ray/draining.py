"""Gives the open answers of a gang time before its actors are ended. Imports no torch."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import RayError

from divisi.cluster.gang.membership.coordinator import CoordinatorLost
from divisi.cluster.ray.coordinator import find_coordinator

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.1
_NEWS_S = 1.2
"""Within this the ingress replicas have heard of it: their knowledge of the gang is half a second old at most, and what
they let in until then is in their next report."""
_LAST_WORDS_S = 3.0
"""For the error events of what has to be ended, after the grace."""


def drain_gang(name: str, grace_s: float, at_once: threading.Event | None = None) -> None:
    """Have the gang take nothing new, and wait until no answer is open.

    After `grace_s`, or as soon as `at_once` is set, the ingress replicas end what is open with an error. Returns in any
    case a few seconds later, and at once where there is no gang.
    """
    begin = time.monotonic()
    hurry = at_once or threading.Event()
    hurried = False
    try:
        coordinator: Any = find_coordinator(name)
        ray.get(coordinator.drain.remote(grace_s), timeout=5)
        end = begin + grace_s + _LAST_WORDS_S
        while time.monotonic() < end:
            if hurry.wait(0 if hurried else _LOOK_EVERY_S) and not hurried:
                hurried = True
                ray.get(coordinator.drain.remote(0.0), timeout=5)
                end = time.monotonic() + _LAST_WORDS_S
            if hurried:
                threading.Event().wait(_LOOK_EVERY_S)  # Ray offers nothing to await here
            open_answers = ray.get(coordinator.open_answers.remote(), timeout=5)
            if open_answers == 0 and time.monotonic() - begin > _NEWS_S:
                return
    except (CoordinatorLost, RayError) as error:
        log.debug("nothing to drain: %s", error)
