"""Which Ray cluster a server belongs to, who says so, and whether anybody answers there. Does not import Ray."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from divisi.deploy.ray.start_errors import StartFailed
from divisi.deploy.settings import SettingsError, Surroundings

CONNECT_S = 3.0
_SHORT_TEMP_DIR = Path("/tmp")
_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix domain socket on Linux (`sun_path`, without its closing zero)."""
_BELOW_TEMP_DIR = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""What Ray appends to the folder for temporary files for its longest socket, with the longest process id."""


@dataclass(frozen=True, slots=True)
class ClusterAddress:
    """A cluster to join."""

    address: str
    """HOST:PORT of its head's GCS."""
    source: str
    """Who says so, for people."""
    remedy: str
    """What to do where it is wrong."""
    found: bool = False
    """Whether Ray finds it by itself: then, and not for an address that it is given, it also looks for its token."""

    def check(self, timeout_s: float = CONNECT_S) -> None:
        """Raise StartFailed unless something listens there: Ray itself would try again for minutes.

        Raises SettingsError where the address is none.
        """
        host, port = self._host_and_port()
        try:
            socket.create_connection((host, port), timeout_s).close()
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise StartFailed(
                f"no Ray cluster at {self.address}, which {self.source} names ({reason}); {self.remedy}"
            ) from None

    def _host_and_port(self) -> tuple[str, int]:
        host, _, port = self.address.rpartition(":")
        if "://" in self.address:
            raise SettingsError(
                f"{self.source} names {self.address!r}: a server cannot be run through the Ray Client; "
                "give HOST:PORT of the cluster's head, on one of its nodes"
            )
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"{self.source} names {self.address!r}, which is not HOST:PORT; {self.remedy}")
        return host.strip("[]"), int(port)


def find_cluster(surroundings: Surroundings) -> ClusterAddress | None:
    """The cluster that RAY_ADDRESS names, else the one of this machine's last `ray start`; None: start one.

    Ray's own rules, but for two: `auto` joins no cluster that another program started for itself, and an empty file is
    an error. Raises SettingsError.
    """
    named = surroundings.ray_address
    if named == "local":
        return None
    if named is not None and named != "auto":
        return ClusterAddress(
            named,
            "the environment variable RAY_ADDRESS",
            "correct it, set RAY_AUTH_MODE=token if it wants a token, or RAY_ADDRESS=local to start a Ray of its own",
        )
    file = surroundings.temp_dir / "ray" / "ray_current_cluster"
    source = f"the file {file}, left by `ray start`,"
    remedy = "start that cluster again, remove the file, or set RAY_ADDRESS=local to start a Ray of its own"
    try:
        address = file.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        if named == "auto":
            raise SettingsError(
                f"RAY_ADDRESS=auto, but `ray start` has left no address in {file}; "
                "start a cluster with `ray start --head`, or unset RAY_ADDRESS to start a Ray of its own"
            ) from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise SettingsError(f"{source} cannot be read ({reason}); {remedy}") from None
    return ClusterAddress(address, source, remedy, found=named is None)


def short_temp_dir(surroundings: Surroundings) -> Path | None:
    """Another folder for a Ray of its own, where its sockets' paths were too long below the usual one; else None.

    Raises SettingsError where the usual one cannot be a folder: Ray's processes would fail there one after the other.
    """
    folder = surroundings.temp_dir.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written by this user" if os.path.isdir(nearest) else "is no folder"
        raise SettingsError(
            f"{surroundings.temp_dir_variable or 'temporary files'}: {nearest} {reason}; "
            "name another folder in the environment variable RAY_TMPDIR"
        )
    length = len(bytes(folder)) + _BELOW_TEMP_DIR
    return None if length <= _SOCKET_PATH_BYTES else _SHORT_TEMP_DIR / "ray"
