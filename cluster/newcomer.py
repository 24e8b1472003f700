"""How the process of a rank starts that others wait for. Imports no torch."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def made_to_last() -> Iterator[None]:
    """What is made meanwhile, and all that there was, is there for good: the collector of garbage looks at none of it.

    For a rank's imports. It would go three times through what is made, 280,000 objects, and once more when Serve has it
    do so after a replica's constructor: just when the newcomer's peers wait for it to meet them, while the collector
    keeps the interpreter lock for 0.2 to 0.35 s on a slow core.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
