"""Exceptions of Ray in one line."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from divisi.cluster.errors import DivisiError
from divisi.deploy.ray.interruptible import Stopped
from divisi.deploy.ray.start_errors import StartFailed, in_one_line, one_line
from divisi.deploy.settings import SettingsError

DEPLOY_FAILED = """\
Deploying app 'divisi' failed with exception:
Traceback (most recent call last):
  File "application_state.py", line 9, in build
    raise cause
ValueError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 1, in <module>
    open("x")
PermissionError: [Errno 13] Permission denied: '/x'
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DEPLOY_FAILED, "PermissionError: [Errno 13] Permission denied: '/x'"),
        (RayTaskError("f", "Traceback (most recent call last):\n  at\nKeyError: 1", KeyError(1)), "1"),
        (ValueError("first.\nsecond"), "first"),
        (GetTimeoutError(), "GetTimeoutError"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9"), "Version mismatch: The clus"),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task"),
    ],
)
def test_the_line_that_says_what_happened(error: Exception | str, line: str) -> None:
    assert one_line(error).startswith(line)
    assert "\n" not in one_line(error)


def test_an_exception_gets_a_remedy() -> None:
    with pytest.raises(StartFailed, match=r"^Ray failed: it is so; wait$"), in_one_line("Ray failed", "wait"):
        raise Exception("it is so.\nThe rest")


def test_other_kinds_pass() -> None:
    with pytest.raises(KeyError), in_one_line("Ray failed", "wait", OSError):
        raise KeyError


@pytest.mark.parametrize("error", [DivisiError("ours"), SettingsError("ours"), Stopped()])
def test_ours_pass(error: Exception) -> None:
    with pytest.raises(type(error)), in_one_line("Ray failed", "wait"):
        raise error
