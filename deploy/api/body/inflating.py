"""Where the pieces of a request's body go, as they are or inflated, up to a limit on what comes out."""

from __future__ import annotations

import zlib

_GZIP = 16 + zlib.MAX_WBITS


class TooMuchError(Exception):
    """More bytes than the limit."""


class Plain:
    """A body as it is."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._body = bytearray()

    def write(self, piece: bytes) -> None:
        """Take one piece. Raises TooMuchError."""
        self._body += piece
        if len(self._body) > self._max_bytes:
            raise TooMuchError

    def close(self) -> bytes:
        """The whole body."""
        return bytes(self._body)


class Gunzip:
    """A body inflated while it comes, never by more than the limit, however far a small piece would blow up."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._plain = Plain(max_bytes)
        self._left = max_bytes + 1  # one byte more tells that there is too much
        self._stream = zlib.decompressobj(_GZIP)

    def write(self, piece: bytes) -> None:
        """Take one piece. Raises TooMuchError, and zlib.error for what gzip didn't make."""
        while piece:
            if self._stream.eof:  # gzip files may be joined
                self._stream = zlib.decompressobj(_GZIP)
            out = self._stream.decompress(piece, self._left)
            self._left -= len(out)
            self._plain.write(out)
            piece = self._stream.unconsumed_tail or self._stream.unused_data

    def close(self) -> bytes:
        """The whole body. Raises zlib.error where the end is missing."""
        if not self._stream.eof:
            raise zlib.error("its end is missing")
        return self._plain.close()
