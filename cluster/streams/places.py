"""Where a worker's doors for the ingresses are: a Unix socket, and a port where other hosts may come."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import tempfile
from pathlib import Path

from divisi.cluster.door import Place, private_folder
from divisi.cluster.seats import Address, StreamAddress

_LONGEST = 60
"""Characters of a folder that leave room for a name in a socket's path."""


def stream_places(host: str) -> list[Place]:
    """The places to open. `host` is the node's address; what only this machine can reach gets no port."""
    folder = Path(tempfile.gettempdir()) / f"divisi-{os.geteuid()}"
    if len(os.fsencode(folder)) > _LONGEST:
        folder = Path("/tmp") / folder.name
    private_folder(folder)
    _remove_orphans(folder)
    path: Place = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
    return [path] if ipaddress.ip_address(host).is_loopback else [path, Address(host)]


def stream_address(host: str, places: list[Place]) -> StreamAddress:
    """How the ingresses are told of places that are open."""
    port = next((place.port for place in places if isinstance(place, Address)), 0)
    path = next(str(place) for place in places if isinstance(place, Path))
    return StreamAddress(host, port, path)


def _remove_orphans(folder: Path) -> None:
    """The sockets of processes that were killed."""
    for path in folder.iterdir():
        pid = path.name.partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and not _is_open(path):
            path.unlink(missing_ok=True)


def _is_open(path: Path) -> bool:
    """Whether somebody listens, in another container perhaps."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
