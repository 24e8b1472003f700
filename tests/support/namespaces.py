"""Processes with a mount namespace of their own."""

from __future__ import annotations

import subprocess

OWN_SHM = "mount -t tmpfs none /dev/shm"
OWN_PIDS = ("--pid", "--fork", "--mount-proc", "--kill-child")


def in_a_mount_namespace(prepare: str, *also: str) -> tuple[str, ...]:
    """What comes before a command that is to run in one, which a line of a shell prepares; `also`: see unshare.

    The process is the same, unless it is to `--fork`.
    """
    return "unshare", "--map-root-user", "--mount", *also, "sh", "-c", f'{prepare} && exec "$0" "$@"'


def can_unshare() -> bool:
    """Whether this machine lets us have one, with process numbers of its own."""
    command = [*in_a_mount_namespace(OWN_SHM, *OWN_PIDS), "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False
