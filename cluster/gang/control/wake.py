"""Waking a loop that is parked in `select`, from another thread. Imports no torch."""

from __future__ import annotations

import contextlib
import socket


class Wake:
    """A level-triggered signal with a file descriptor, so that it can be waited for together with sockets."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def set(self) -> None:
        """Wake the loop; may be called from any thread, and again before the loop has noticed."""
        # A full pipe means that the loop is going to wake anyway.
        with contextlib.suppress(BlockingIOError):
            self._sender.send(b"\0")

    def clear(self) -> None:
        """Forget the signals so far. Call before looking for what they announce."""
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def fileno(self) -> int:
        """For `select`."""
        return self._receiver.fileno()

    def close(self) -> None:
        """Release both ends."""
        self._receiver.close()
        self._sender.close()
