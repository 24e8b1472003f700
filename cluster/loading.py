"""Loading a rank's weights leaves no threads behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from divisi.cluster.cores import usable_cores
from divisi.cluster.spec import GangSpec

_Made = TypeVar("_Made")


def load_in_thread(spec: GangSpec, load: Callable[[], _Made]) -> _Made:
    """What `load` returns, done in a thread that then ends, and with it the OpenMP threads that computed for it.

    They would wait for more as long as that thread lives. Where a process has more threads than cores, counted over
    all of these, OpenMP's wait by sleeping: those of the step loop would wake each other a hundred times in a step.

    Which ranks run beside this one is not known yet: it takes what it could have if all did; see `CoreShare`.
    """

    def work() -> _Made:
        torch.set_num_threads(spec.threads or max(usable_cores() // spec.shape.size, 1))  # it starts them
        return load()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()
