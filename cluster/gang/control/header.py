"""Messages of the control mesh: small, binary, of bounded size. Imports no torch.

Little-endian. A message begins with its kind (u8), the bytes that follow this prefix (u16), epoch (u32) and step (u64).
Then come, in

- a hello: the sender's role (u8: 0 attention, 1 expert) and the index of its seat (u16);
- an announcement: whether it is to have a step for itself (u8), rows of the last pass's second micro-batch (u32), rows
  by pass (u32 each);
- an end: nothing;
- a beat, whose step is a count of waits: the sender's role and index as in a hello, and whether it is busy (u8);
- a header: the number of passes (u8), the length of the trace context (u8), the trace context; and for each pass its
  kind (u8), number of counts (u16), bucket (u32), and the counts above 0 (seat u16, rows u32, those of the second
  micro-batch u32).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from divisi.cluster.passes import Pass, PassKind
from divisi.cluster.seats import Role, Seat

MAX_PASSES = 32
_PREFIX = struct.Struct("<BHIQ")
_SEAT = struct.Struct("<BH")
_BEAT = struct.Struct("<BHB")
_HEADER = struct.Struct("<BB")
_PASS = struct.Struct("<BHI")
_COUNT = struct.Struct("<HII")
_ROLES: tuple[Role, ...] = ("attention", "expert")


class _Kind(enum.IntEnum):
    HELLO = 1
    ANNOUNCEMENT = 2
    HEADER = 3
    END = 4
    BEAT = 5


# By kind, so that noise is told from a message before anything waits for its end.
_LONGEST: dict[int, int] = {
    _Kind.HELLO: _SEAT.size, _Kind.ANNOUNCEMENT: 5 + 4 * MAX_PASSES, _Kind.HEADER: 0xFFFF, _Kind.END: 0,
    _Kind.BEAT: _BEAT.size,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hello:
    """First on a connection: the holder of a seat has entered the epoch."""

    epoch: int
    seat: Seat

    def encode(self) -> bytes:
        """The bytes on the wire."""
        return _encode(_Kind.HELLO, self.epoch, 0, _SEAT.pack(_ROLES.index(self.seat.role), self.seat.index))


@dataclass(frozen=True, slots=True)
class Announcement:
    """A worker to the leader: what it brings to a step, nothing where `counts` is empty. Rings a parked leader."""

    epoch: int
    step: int
    counts: tuple[int, ...]
    """Rows by pass: drafts first, the full pass last."""
    alone: bool = False
    """Nobody else is to bring rows to that step."""
    second: int = 0
    """Rows of the full pass that make up its second micro-batch."""

    def encode(self) -> bytes:
        """The bytes on the wire."""
        assert len(self.counts) <= MAX_PASSES, f"{len(self.counts)} passes in a step"
        body = struct.pack(f"<?I{len(self.counts)}I", self.alone, self.second, *self.counts)
        return _encode(_Kind.ANNOUNCEMENT, self.epoch, self.step, body)


@dataclass(frozen=True, slots=True)
class Header:
    """The leader to all: a step begins, and these are its passes."""

    epoch: int
    step: int
    passes: tuple[Pass, ...]
    """Drafts first, the full pass last."""
    trace: bytes = b""
    """The span of a step that is sampled, for the observers; else empty. At most 255 bytes."""

    def includes(self, worker: int) -> bool:
        """Whether `attention:worker` brings rows to any pass."""
        return any(step_pass.rows(worker) for step_pass in self.passes)

    def encode(self) -> bytes:
        """The bytes on the wire."""
        assert len(self.passes) <= MAX_PASSES, f"{len(self.passes)} passes in a step"
        parts = [_HEADER.pack(len(self.passes), len(self.trace)), self.trace]
        for step_pass in self.passes:
            second = step_pass.second
            counts = [(seat, rows, second.get(seat, 0)) for seat, rows in step_pass.counts.items() if rows]
            parts.append(_PASS.pack(step_pass.kind, len(counts), step_pass.bucket))
            parts += [_COUNT.pack(*count) for count in counts]
        return _encode(_Kind.HEADER, self.epoch, self.step, b"".join(parts))


@dataclass(frozen=True, slots=True)
class End:
    """The leader to all, in the place of a header: no step begins any more, since others come or go."""

    epoch: int

    def encode(self) -> bytes:
        """The bytes on the wire."""
        return _encode(_Kind.END, self.epoch, 0, b"")


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank lives; first, and all there is, on its second connection."""

    epoch: int
    seat: Seat
    waits: int
    """See Activity, as the next one."""
    busy: bool

    def encode(self) -> bytes:
        """The bytes on the wire."""
        role = _ROLES.index(self.seat.role)
        return _encode(_Kind.BEAT, self.epoch, self.waits, _BEAT.pack(role, self.seat.index, self.busy))


Message = Hello | Announcement | Header | End | Beat


class MessageReader:
    """Cuts a byte stream into messages, of which it never holds more than one that is incomplete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Take what arrived; returns the messages that are now complete. Raises ValueError on anything else."""
        self._buffer += data
        messages: list[Message] = []
        start = 0
        while len(self._buffer) - start >= _PREFIX.size:
            kind, length, epoch, step = _PREFIX.unpack_from(self._buffer, start)
            if length > _LONGEST.get(kind, -1):
                raise ValueError(f"no message of kind {kind} has {length} bytes")
            body = start + _PREFIX.size
            if len(self._buffer) < body + length:
                break
            start = body + length
            messages.append(_decode(kind, epoch, step, self._buffer[body:start]))
        del self._buffer[:start]
        return messages


def _encode(kind: _Kind, epoch: int, step: int, body: bytes) -> bytes:
    return _PREFIX.pack(kind, len(body), epoch, step) + body


def _decode(kind: int, epoch: int, step: int, body: bytearray) -> Message:
    try:
        if kind == _Kind.HEADER:
            return _decode_header(epoch, step, body)
        if kind == _Kind.END:
            return End(epoch)
        if kind == _Kind.ANNOUNCEMENT:
            alone, second, *counts = struct.unpack(f"<?{len(body) // 4}I", body)
            if second and second >= counts[-1]:
                raise ValueError(f"an announcement has {second} of {counts[-1]} rows in a second micro-batch")
            return Announcement(epoch, step, tuple(counts), alone, second)
        if kind == _Kind.BEAT:
            role, index, busy = _BEAT.unpack(body)
            return Beat(epoch, Seat(_ROLES[role], index), step, bool(busy))
        role, index = _SEAT.unpack(body)
        return Hello(epoch, Seat(_ROLES[role], index))
    except (struct.error, IndexError) as error:
        raise ValueError(f"malformed {_Kind(kind).name.lower()}: {error}") from error


def _decode_header(epoch: int, step: int, body: bytearray) -> Header:
    """Raises ValueError, and struct.error where it ends too early."""
    num_passes, trace_length = _HEADER.unpack_from(body)
    at = _HEADER.size + trace_length
    trace = bytes(body[_HEADER.size : at])
    if num_passes > MAX_PASSES:
        raise ValueError(f"a header has {num_passes} passes, more than {MAX_PASSES}")
    passes = []
    for left in reversed(range(num_passes)):
        kind, num_counts, bucket = _PASS.unpack_from(body, at)
        at += _PASS.size
        end = at + num_counts * _COUNT.size
        if end > len(body) or kind != (PassKind.DRAFT if left else PassKind.FULL):
            raise ValueError(f"a header of {num_passes} passes has one of kind {kind} and {num_counts} counts in it")
        counts: dict[int, int] = {}
        second: dict[int, int] = {}
        for seat, rows, later in _COUNT.iter_unpack(body[at:end]):
            if seat in counts or not later < rows:
                raise ValueError("a pass of a header counts a seat twice, no rows, or all in a second micro-batch")
            counts[seat] = rows
            if later:
                second[seat] = later
        passes.append(Pass(PassKind(kind), counts, second, bucket))
        at = end
    if not passes or at != len(body):
        raise ValueError(f"a header of {num_passes} passes has {len(body) - at} bytes after them")
    return Header(epoch, step, tuple(passes), trace)
