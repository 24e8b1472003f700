"""Processes with a mount namespace of their own."""

from __future__ import annotations

import subprocess


def in_a_mount_namespace(prepare: str) -> tuple[str, ...]:
    """What comes before a command that is to run in one, which a line of a shell prepares; the process is the same."""
    return "unshare", "--map-root-user", "--mount", "sh", "-c", f'{prepare} && exec "$0" "$@"'


def can_unshare() -> bool:
    """Whether this machine lets us have one."""
    command = [*in_a_mount_namespace("mount -t tmpfs none /dev/shm"), "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False
