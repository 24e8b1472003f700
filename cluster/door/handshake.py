"""The handshake by which both sides prove that they know the secret. Bytes in, bytes out; sockets are elsewhere.

    client                                server
    greeting, nonce (40 bytes)      --->
                                    <---  greeting, nonce (40)
    proof (32)                      --->
                                    <---  proof (32)

A proof is a MAC under the secret of both greetings, and of the server's certificate where there is one. Each side has
drawn a nonce, so nothing recorded proves anything again, and a proof names its side, so none can be sent back to whom
it came from. The one who connects proves first: whoever just calls learns nothing that depends on the secret. Keys for
the frames are derived from the same, one per direction.
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import blake2b
from typing import Literal

from divisi.cluster.door.errors import HandshakeFailed
from divisi.cluster.door.framer import Framer
from divisi.cluster.door.secret import Secret

Side = Literal["client", "server"]

_NAME = b"divisi-"
_GREETING = _NAME + b"1"
_NONCE = 32
_HELLO = len(_GREETING) + _NONCE
_PROOF = 32
_OTHER: dict[Side, Side] = {"client": "server", "server": "client"}


class Handshake:
    """One side of it, for one connection."""

    def __init__(self, secret: Secret, side: Side, certificate: bytes = b"") -> None:
        """`certificate` is the server's, as both sides see it: a relay with another one is found out."""
        self._secret = secret
        self._side = side
        self._certificate = certificate
        self._hello = _GREETING + secrets.token_bytes(_NONCE)
        self._transcript: bytes | None = None
        """Once the other side's greeting is known."""
        self._buffer = b""
        self.done = False

    def begin(self) -> bytes:
        """What to send before anything was received."""
        return self._hello if self._side == "client" else b""

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take what was received and return what to send. Raises HandshakeFailed, and is then of no use any more."""
        self._buffer += data
        reply = b""
        if self._transcript is None:
            self._check_greeting()
            if len(self._buffer) < _HELLO:
                return b""
            theirs, self._buffer = self._buffer[:_HELLO], self._buffer[_HELLO:]
            hellos = self._hello + theirs if self._side == "client" else theirs + self._hello
            self._transcript = hellos + self._certificate
            reply = self._proof(self._side) if self._side == "client" else self._hello
        if not self.done and len(self._buffer) >= _PROOF:
            theirs, self._buffer = self._buffer[:_PROOF], self._buffer[_PROOF:]
            if not hmac.compare_digest(theirs, self._proof(_OTHER[self._side])):
                raise HandshakeFailed(
                    "secret", "does not know this gang's secret; give all its processes the same gang.secret_file"
                )
            self.done = True
            if self._side == "server":
                reply += self._proof("server")
        return reply

    def finish(self) -> tuple[Framer, bytes]:
        """The framer of the connection, and what has already arrived for it. Only when done."""
        assert self.done
        keys = {side: self._mac(f"frames {side}".encode()) for side in _OTHER}
        return Framer(keys[self._side], keys[_OTHER[self._side]]), self._buffer

    def _check_greeting(self) -> None:
        """At the first byte that is wrong: a client of something else may never send enough of them."""
        start = self._buffer[: len(_GREETING)]
        if _GREETING.startswith(start):
            return
        if len(start) == len(_GREETING) and start.startswith(_NAME):
            raise HandshakeFailed(
                "version", "speaks another version of the protocol; run the same version of Divisi in all processes"
            )
        raise HandshakeFailed("not ours", f"is no process of Divisi: it began with {start!r}")

    def _proof(self, side: Side) -> bytes:
        return self._mac(f"proof {side}".encode())

    def _mac(self, purpose: bytes) -> bytes:
        assert self._transcript is not None
        return blake2b(self._transcript, digest_size=_PROOF, key=self._secret.key, person=purpose).digest()
