"""A range of ports for each server on a machine, for its ingress replicas and what Ray starts beside them.

Ray takes the first free ports from 30000 on in every cluster. Two servers on a machine would then use each other's:
a replica dies, the other server's new one gets its port, and HAProxy sends the first one's clients there.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

FIRST, LAST = 30_000, 32_767
"""Below those that the kernel gives to outgoing connections."""
COUNT = 300
"""As many replicas as there may be, and some for those whose ports rest after they have ended."""
_NAMES = "divisi/ports"


class NoPortsLeft(RuntimeError):
    """Other servers on this machine hold all ranges."""


@contextlib.contextmanager
def hold_ports() -> Iterator[range]:
    """Ports that no other server on this machine takes, until the context or the process ends. Raises NoPortsLeft.

    By a lock like that of `divisi.deploy.ray.port_lock`. Another program may have some of them; Ray passes over those.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as lock:
        yield _first_free(lock)


def _first_free(lock: socket.socket) -> range:
    firsts = range(FIRST, LAST - COUNT, COUNT)
    for first in firsts:
        with contextlib.suppress(OSError):  # another server's
            lock.bind(f"\0{_NAMES}/{first}")
            return range(first, first + COUNT)
    raise NoPortsLeft(f"{len(firsts)} servers run on this machine")
