"""What NCCL needs to be one backend among others: a lost peer that ends a step, not the process.

Waits block the host, since that is the only way to a deadline. It has run with all ranks on one card only
(tests/distributed/test_nccl.py).
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from divisi.cluster.activity import Activity
from divisi.cluster.dispatch.transport.door_store import DoorStore
from divisi.cluster.errors import StepAborted

# The type stubs lack most of what the backends have.
_dist: Any = torch.distributed
_FAULTS_ARE_OURS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Read by torch whenever a group is made. Without them its watchdog ends the process that has lost a peer."""


def nccl_backend(store: DoorStore, rank: int, size: int, timeout: timedelta) -> Any:
    """A process group of NCCL's. Raises RuntimeError."""
    os.environ.update(_FAULTS_ARE_OURS)
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = _dist.ProcessGroupNCCL(store, rank, size, options)
    # Never destroyed: the destructor holds the interpreter's lock while it waits for a thread that asks our store,
    # which is in Python. What an abort leaves of a group is small.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
    return backend


@dataclass(frozen=True, slots=True)
class NcclTransfer:
    """See Transfer. torch's own wait with a deadline sleeps for a millisecond at a time, longer than most take."""

    work: Any
    seat: str
    activity: Activity

    def wait(self, deadline: float) -> None:
        """See Transfer."""
        self.activity.waiting()
        try:
            while not self.work.is_completed():
                if time.monotonic() > deadline:
                    raise StepAborted("transfer failed: it did not end in time", self.seat)
            self.work.wait()  # lets the stream follow, and raises what the peer's end or an abort has left
        except RuntimeError as error:
            raise StepAborted(f"transfer failed: {error}", self.seat) from error
        self.activity.goes_on()
