"""Ports of this machine: a free one, and which ones processes listen on."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"
_FILES = ("tcp", "tcp6")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def listening(pids: Iterable[int]) -> set[tuple[int, str, int]]:
    """(pid, address, port) of every TCP socket that these processes listen on, by the kernel's own tables."""
    sockets = {}
    for name in _FILES:
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTEN:
                sockets[words[9]] = words[1]
    found = set()
    for pid in pids:
        for inode in _inodes(pid) & sockets.keys():
            address, _, port = sockets[inode].partition(":")
            found.add((pid, _written(address), int(port, 16)))
    return found


def _inodes(pid: int) -> set[str]:
    inodes = set()
    try:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            target = str(file.readlink())
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    except OSError:  # it has ended
        pass
    return inodes


def _written(address: str) -> str:
    """Of the kernel's hexadecimal words, each in this machine's (little) byte order."""
    words = b"".join(bytes.fromhex(address[place : place + 8])[::-1] for place in range(0, len(address), 8))
    family = socket.AF_INET if len(words) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, words)
