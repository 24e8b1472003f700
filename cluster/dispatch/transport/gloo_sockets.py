"""Breaking the waits of a gloo group from another thread, which gloo itself cannot: `abort` waits for their deadlines.

A wait ends at once when its connection does. A group's connections are told from this process's others by the ports of
its ranks' listeners: whoever accepted has its own as the local one, whoever connected the peer's as the remote one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import torch.distributed

_dist: Any = torch.distributed
_making = threading.Lock()
"""A device's listener is found among this process's: one is made at a time."""


class GlooSockets:
    """The connections of one rank's group."""

    def __init__(self, host: str) -> None:
        with _making:
            before = _listening(host)
            self.device = _dist.ProcessGroupGloo.create_device(hostname=host)
            self._ports = _listening(host) - before
        self._peers: set[tuple[str, int]] = set()

    @property
    def told(self) -> str:
        """What the other ranks have to `learn`. Empty where the listener was not found."""
        return ",".join(map(str, sorted(self._ports)))

    def learn(self, host: str, told: str) -> None:
        """What another rank on that host has told."""
        self._peers |= {(host, int(port)) for port in told.split(",") if port}

    def shut(self) -> None:
        """End all connections, which both sides notice; from any thread."""
        for connection in _sockets():
            with contextlib.suppress(OSError):  # it has no other side, as the listener, or not any more
                peer = connection.getpeername()[:2]
                if connection.getsockname()[1] in self._ports or peer in self._peers:
                    connection.shutdown(socket.SHUT_RDWR)


def _listening(host: str) -> set[int]:
    """Ports on which this process listens at an address."""
    found = set()
    for listener in _sockets():
        with contextlib.suppress(OSError):
            name = listener.getsockname()
            if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and name[0] == host:
                found.add(name[1])
    return found


def _sockets() -> Iterator[socket.socket]:
    """This process's internet sockets, as copies that are closed again."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found
