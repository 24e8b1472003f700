"""What keeps a server from starting, each in one line with a remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from divisi.cluster.errors import DivisiError
from divisi.deploy.ray.interruptible import Stopped
from divisi.deploy.settings import SettingsError


class StartFailed(DivisiError):
    """The server could not be started; the text says which part failed and why."""


@contextlib.contextmanager
def in_one_line(what_failed: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an exception of these kinds (of any, where none is named) into StartFailed; our own pass.

    For calls of Ray, whose exceptions carry remote tracebacks, are of many kinds, and sometimes of none.
    """
    try:
        yield
    except (DivisiError, SettingsError, Stopped):
        raise
    except Exception as error:
        if kinds and not isinstance(error, kinds):
            raise
        raise StartFailed(f"{what_failed}: {one_line(error)}; {remedy}") from error


def one_line(error: Exception | str) -> str:
    """The line of an exception's text that says what happened: the last one of a traceback, else the first."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, Exception) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    traces = [place for place, line in enumerate(text.splitlines()) if "Traceback (most recent call last)" in line]
    if not traces:
        return lines[0].rstrip(".;")
    # After the frames, which are indented, a traceback's exception begins its line; chained ones come before it.
    rest = text.splitlines()[traces[-1] + 1 :]
    said = next((line for line in rest if line.strip() and not line.startswith((" ", "\t"))), lines[-1])
    return said.strip().rstrip(".;")
