"""The program that Ray Serve starts in place of HAProxy: `python -m divisi.deploy.haproxy.start FOLDER BINARY ...`.

It becomes HAProxy, with the same process id, by which Ray knows it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from divisi.deploy.haproxy.config import Place, admin_socket, confine, has_servers

_ANSWER_S = 1.0
_KNOWN = "known.cfg"


def main(arguments: list[str]) -> None:
    """Edit the configuration that Ray has just written, and become HAProxy. Raises ConfigError and OSError."""
    folder, binary, *options = arguments
    if "-f" in options:
        place = Place.load(folder)
        file = Path(options[options.index("-f") + 1])
        config = confine(file.read_text(encoding="utf-8"), place)
        is_first = "-sf" not in options
        config = _with_known_replicas(config, file.with_name(_KNOWN), is_first)
        file.write_text(config, encoding="utf-8")
        if is_first:
            options += _take_over(admin_socket(config))
        # Ray ends what is in the process group of a manager that was killed. An HAProxy alone goes on until the next
        # manager's takes over, and ends with the server as its keeper's descendant.
        os.setsid()
        if place.cores:
            os.sched_setaffinity(0, place.cores)
    os.execv(binary, [binary, *options])


def _with_known_replicas(config: str, known: Path, is_first: bool) -> str:
    """The configuration, or the last one that had replicas, where a new manager has not been told of any yet.

    Ray starts a manager in place of one that died with none, and would answer 503 until it tells it a moment later.
    """
    if has_servers(config):
        known.write_text(config, encoding="utf-8")
    elif is_first and known.exists():
        return known.read_text(encoding="utf-8")
    else:
        known.unlink(missing_ok=True)
    return config


def _take_over(path: str) -> list[str]:
    """Options for taking the listening socket over from an HAProxy whose manager was killed; it ends its streams.

    Ray itself would start another beside it, which could not listen.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(_ANSWER_S)
        said = b""
        try:
            client.connect(path)
            client.sendall(b"show info\n")
            while piece := client.recv(4096):
                said += piece
        except OSError:
            return []  # nobody is there, as usual
    pid = re.search(rb"^Pid: (\d+)$", said, re.M)
    return [] if pid is None else ["-sf", pid[1].decode(), "-x", path]


if __name__ == "__main__":
    main(sys.argv[1:])
