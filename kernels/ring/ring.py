"""A ring of messages in shared memory: one process writes, another one reads. Needs the C++ kernels."""

from __future__ import annotations

import ctypes
import enum
import mmap

from divisi.kernels.native.loader import Library

_HEADER = 256
_SLOT_HEADER = 64
_SLOTS = 4
"""Messages that are under way at once, at most."""


class Outcome(enum.IntEnum):
    """How an attempt ended; as in native.cpp."""

    DONE = 0
    LATE = 1
    GONE = 2
    TOO_LONG = 3


class Ring:
    """One direction between two processes; each has a `Ring` over its own mapping of the same memory.

    Calls block the calling thread, and give up the interpreter lock meanwhile.
    """

    def __init__(self, library: Library, memory: mmap.mmap, offset: int, capacity: int, fd: int, spin_s: float) -> None:
        """At an offset in zeroed memory; `capacity` as given to `size`.

        `fd` is a connection to the other process, by whose end its death is noticed. Who waits spins for `spin_s`
        before it sleeps.
        """
        self._functions = library.functions
        self._memory = memory
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
        self._outcome = ctypes.c_int()
        self._rest = _SLOTS, capacity, fd, int(spin_s * 1e9)

    @staticmethod
    def size(capacity: int) -> int:
        """Bytes of memory that a ring takes for messages of up to `capacity` bytes; pages never used take none."""
        return _HEADER + _SLOTS * (_SLOT_HEADER + capacity)

    def put(self, data: int, size: int, wait_s: float) -> Outcome:
        """Send so many bytes at an address, once there is a slot; `wait_s` 0 only looks."""
        self._functions.divisi_ring_put(
            self._at, data, size, *self._rest, int(wait_s * 1e9), ctypes.byref(self._outcome)
        )
        return Outcome(self._outcome.value)

    def take(self, data: int, size: int, wait_s: float) -> Outcome:
        """Receive the next message of at most so many bytes to an address."""
        self._functions.divisi_ring_take(
            self._at, data, size, *self._rest, int(wait_s * 1e9), ctypes.byref(self._outcome)
        )
        return Outcome(self._outcome.value)

    def close(self) -> None:
        """Who waits at either end stops waiting; what was sent can still be taken."""
        self._functions.divisi_ring_close(self._at)
