"""Where a door is: the node's own address, or a Unix socket in a folder that only its owner may enter."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

from divisi.cluster.door.errors import DoorError
from divisi.cluster.seats import Address

Place = Address | Path
"""A host and a port (0: a free one), or the path of a Unix socket."""

BACKLOG = 128
_MAX_PATH = 107


def listen(place: Place) -> tuple[socket.socket, Place]:
    """A listener that doesn't block, and its place with the port that it got. Raises DoorError."""
    try:
        if isinstance(place, Path):
            return _listen_at_path(place), place
        return _listen_at_host(place)
    except OSError as error:
        raise DoorError(f"cannot listen at {name(place)}: {error.strerror or error}") from error


def name(place: Place) -> str:
    """For people."""
    return str(place) if isinstance(place, Path) else f"{place.host}:{place.port}"


def private_folder(path: Path) -> None:
    """Make a folder with mode 0700, or check that it is one and our own. Raises DoorError."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise DoorError(f"{path}: cannot make a folder for sockets: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise DoorError(
            f"{path}: sockets go into a folder of the server's own with mode 0700, and this is another; "
            "remove it, or give a folder that does not exist yet"
        )


def _listen_at_path(path: Path) -> socket.socket:
    private_folder(path.parent)
    if len(os.fsencode(path)) > _MAX_PATH:
        raise DoorError(f"{path}: a Unix socket's path has at most {_MAX_PATH} bytes; use a shorter folder")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(os.fspath(path))
        path.chmod(0o600)  # before anybody can connect
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_at_host(place: Address) -> tuple[socket.socket, Address]:
    if place.host in ("", "0.0.0.0", "::"):
        raise DoorError(f"{name(place)} is every address of the machine; give the node's own")
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    listener = socket.create_server((place.host, place.port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener, Address(place.host, listener.getsockname()[1])
