"""How the process of a rank starts beside others that serve. Imports no torch."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import ModuleType

_GIVES_WAY = 10


def import_beside_others(name: str) -> ModuleType:
    """Import a module, and torch with it: others of the machine compute first, and it is there for good.

    In a thread of its own, which gives way on Linux without the rest of its process, and could not take that back. The
    collector of garbage looks at nothing of it, now or later. It would go three times through what is made, 280,000
    objects, and once more when Serve has it do so after a replica's constructor: just when the newcomer's peers wait
    for it to meet them, while the collector keeps the interpreter lock for 0.2 to 0.35 s on a slow core.
    """
    gc.disable()
    try:
        with ThreadPoolExecutor(1, "imports", os.nice, (_GIVES_WAY,)) as aside:
            return aside.submit(import_module, name).result()
    finally:
        gc.freeze()
        gc.enable()
