"""Frames of the control mesh: small, binary, of fixed layout. Imports no torch.

Little-endian: kind (u8), sender's rank (u16), number of counts (u16), epoch (u32), step (u64), then one u32 per count.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

_FIXED = struct.Struct("<BHHIQ")


class Kind(enum.IntEnum):
    """What a frame says."""

    HELLO = 1
    """First on a connection: the sender has entered the epoch."""
    PLAN = 2
    """A worker to the leader: how many tokens it has for the next step. Also rings a leader that is parked."""
    HEADER = 3
    """The leader to all: a step begins, with so many tokens of each worker."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message of the control mesh."""

    kind: Kind
    sender: int
    epoch: int
    step: int
    counts: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """The bytes on the wire."""
        head = _FIXED.pack(self.kind, self.sender, len(self.counts), self.epoch, self.step)
        return head + struct.pack(f"<{len(self.counts)}I", *self.counts)


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Take what arrived; returns the frames that are now complete. Raises ValueError on an unknown kind."""
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= _FIXED.size:
            number, sender, num_counts, epoch, step = _FIXED.unpack_from(self._buffer)
            kind = Kind(number)
            end = _FIXED.size + 4 * num_counts
            if len(self._buffer) < end:
                break
            counts = struct.unpack_from(f"<{num_counts}I", self._buffer, _FIXED.size)
            frames.append(Frame(kind, sender, epoch, step, counts))
            del self._buffer[:end]
        return frames
