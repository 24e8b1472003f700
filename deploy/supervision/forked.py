"""A forked process that ends with its work and never returns into its parent's code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[[], int]) -> int:
    """Run `work` in a child process, whose exit status is what it returns. Returns the child's pid.

    The child skips what is registered for the interpreter's end: the libraries of `work` may wait there for ever.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = work()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - nothing above this may go on in the child
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it has left
                stream.flush()
        os._exit(status)
