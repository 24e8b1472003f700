"""The process that was started: receives signals, passes them on as orders, and waits for the keeper."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

import psutil

from divisi.deploy.supervision.deadlines import KEEPER_S, TAKE_DOWN_S
from divisi.deploy.supervision.forked import fork
from divisi.deploy.supervision.keeper import keep
from divisi.deploy.supervision.orders import AT_ONCE, STOP, Orders
from divisi.deploy.supervision.orphans import adopt_orphans, end_descendants, reap
from divisi.deploy.supervision.signals import STOP_SIGNALS, SignalInbox, readable

_ONE_SIGNAL_S = 0.3
"""Signals closer than this are one: `timeout` sends its own to the program and again to the group, a closed terminal
SIGHUP from the kernel and from the shell."""
_MARGIN_S = 0.5


def supervised(work: Callable[[Orders], int], undo: Callable[[str, bool], object], grace_s: float) -> int:
    """Run `work` in a process of its own and return its exit status; whatever it starts has ended by then.

    SIGINT, SIGTERM and SIGHUP set `orders.stop`, a second one `orders.at_once`. Work that has not ended 7 s after the
    grace is killed. `undo(address, keep_serve)` runs in another process if the driver dies on a cluster it has joined.
    Call it while this process has one thread.
    """
    adopt_orphans()
    strangers = psutil.Process().children()  # a shell that calls `exec` leaves its own children to us
    inbox = SignalInbox(*STOP_SIGNALS, signal.SIGCHLD)
    orders_read, orders_write = os.pipe()

    def kept() -> int:
        inbox.close()
        os.close(orders_write)
        return keep(work, undo, orders_read, grace_s)

    keeper = fork(kept)
    os.close(orders_read)
    try:
        status = _pass_on(inbox, orders_write, keeper, grace_s)
    finally:
        os.close(orders_write)
        inbox.close()
    if status < 0:  # the keeper was killed: what it kept is ours now
        end_descendants(1.0, spared=strangers)
        print("divisi: failed: the process that watches over the server was killed", file=sys.stderr)
        return 1
    return status


def _pass_on(inbox: SignalInbox, orders: int, keeper: int, grace_s: float) -> int:
    """Pass signals on as orders until the keeper has ended; returns its status, negative where a signal ended it."""
    stopped_at: float | None = None
    end = float("inf")
    while True:
        wait_s = end - time.monotonic()
        if wait_s <= 0:
            os.kill(keeper, signal.SIGKILL)
            end = float("inf")
            continue
        readable([inbox], None if wait_s == float("inf") else wait_s)
        numbers = inbox.take()
        if any(number in STOP_SIGNALS for number in numbers):
            now = time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                if stopped_at is None:
                    stopped_at, end = now, now + grace_s + TAKE_DOWN_S + KEEPER_S + _MARGIN_S
                    os.write(orders, STOP)
                elif now - stopped_at > _ONE_SIGNAL_S:
                    os.write(orders, AT_ONCE)
        if (status := reap().get(keeper)) is not None:
            return status
