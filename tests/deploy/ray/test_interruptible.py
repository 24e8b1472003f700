"""Calls that are given up when the stop event is set."""

from __future__ import annotations

import threading

import pytest

from divisi.deploy.ray.interruptible import Interruptible, Stopped


def test_what_a_call_returns_and_raises() -> None:
    interruptibly = Interruptible(threading.Event())
    assert interruptibly(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        interruptibly(lambda: 1 // 0)
    assert interruptibly(threading.get_ident) == interruptibly(threading.get_ident) != threading.get_ident()


def test_a_call_that_never_returns_ends_with_the_stop_event() -> None:
    stop, never = threading.Event(), threading.Event()
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        Interruptible(stop)(never.wait)


def test_a_call_that_has_begun_may_end_within_the_grace() -> None:
    stop = threading.Event()
    assert Interruptible(stop)(lambda: (stop.set(), threading.Event().wait(0.3)), grace_s=30.0) == (None, False)


def test_a_call_that_takes_too_long() -> None:
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        Interruptible(threading.Event())(threading.Event().wait, timeout_s=0.1)
