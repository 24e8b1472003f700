"""Turns what a command raises into one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def exit_status(run: Callable[[], int]) -> int:
    """Run a command. 0, 1 when it failed, 2 for a user's mistake, 130 when interrupted."""
    from divisi.cluster.errors import DivisiError
    from divisi.deploy.settings import SettingsError

    try:
        status = run()
        sys.stdout.flush()
    except (SettingsError, DivisiError) as error:
        # A user's mistakes are ValueErrors too, in all layers: settings, model directory, text.
        mistake = isinstance(error, ValueError)
        print(f"divisi: {'error' if mistake else 'failed'}: {error}", file=sys.stderr)
        return 2 if mistake else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has left, as `| head` does. Python's own flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
