"""Whether a process of this machine is about to be gone, sooner than its sockets tell. Imports no torch.

The kernel frees a killed process's memory before it closes its sockets: some tenths of a second for each GB.
"""

from __future__ import annotations

from pathlib import Path

_EXITING = 0x4
"""The kernel calls it PF_EXITING."""


def is_ending(pid: int) -> bool:
    """Whether a process is being ended, or has been."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True
    state, *others = stat[stat.rindex(b")") + 2 :].split()  # its name, in parentheses, may hold anything
    return state in (b"Z", b"X") or bool(int(others[5]) & _EXITING)
