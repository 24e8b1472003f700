"""Calls that a stop signal can end, although they would not notice one."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Answer = TypeVar("_Answer")
_LOOK_EVERY_S = 0.05


class Stopped(Exception):
    """The stop event was set before the call had returned."""


class Interruptible:
    """Makes calls in a thread of its own, one after the other, and gives up on them when `stop` is set.

    Python carries out signal handlers between two instructions of the main thread only, and Ray's library can spend
    minutes in one. The thread lasts as long as the process: the kernel ends processes that Ray starts together with
    the thread that started them (PR_SET_PDEATHSIG).
    """

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="interruptible", daemon=True).start()

    def __call__(self, call: Callable[[], _Answer], *, grace_s: float = 0.0, timeout_s: float = math.inf) -> _Answer:
        """What `call` returns or raises; Stopped where `stop` is set first, and TimeoutError after `timeout_s`.

        Once stopped it has `grace_s` to come to its end. A call that is given up goes on, and the process is expected
        to end soon.
        """
        outcome: Future[_Answer] = Future()
        finished = threading.Event()
        outcome.add_done_callback(lambda _: finished.set())
        self._calls.put((call, outcome))
        end = time.monotonic() + timeout_s
        while not finished.wait(_LOOK_EVERY_S):
            if self.stop.is_set() and not finished.wait(grace_s):
                raise Stopped
            if time.monotonic() > end:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
        return outcome.result()

    def _work(self) -> None:
        while True:
            call, outcome = self._calls.get()
            try:
                outcome.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised where the call was made
                outcome.set_exception(error)
