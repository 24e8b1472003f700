"""An authenticated connection for a thread that waits: the other end is a door's channel."""

from __future__ import annotations

import socket
import time
from collections import deque

from divisi.cluster.door.errors import ChannelClosed, DoorError, HandshakeFailed
from divisi.cluster.door.framer import Framer
from divisi.cluster.door.handshake import Handshake
from divisi.cluster.door.secret import Secret
from divisi.cluster.door.tls import TlsFiles
from divisi.cluster.seats import Address

_CHUNK = 65536


class Line:
    """Payloads of up to `MAX_FRAME` bytes, both ways."""

    def __init__(self, place: Address, secret: Secret, deadline: float, tls: TlsFiles | None = None) -> None:
        """Go through a door, by a deadline in `time.monotonic()` seconds. Raises DoorError."""
        self._where = f"{place.host}:{place.port}"
        self._arrived: deque[bytes] = deque()
        try:
            self._socket = socket.create_connection((place.host, place.port), timeout=_left_s(deadline))
        except OSError as error:
            raise DoorError(f"cannot reach {self._where}: {error.strerror or error}") from error
        try:
            self._framer = self._shake_hands(secret, deadline, tls)
        except BaseException:
            self.close()
            raise

    def send(self, payload: bytes, deadline: float) -> None:
        """Raises ChannelClosed."""
        self._send(self._framer.seal(payload), deadline)

    def receive(self, deadline: float) -> bytes:
        """The next payload. Raises ChannelClosed, and DoorError for what is no frame of the other side's."""
        while not self._arrived:
            self._arrived.extend(self._framer.feed(self._receive(deadline)))
        return self._arrived.popleft()

    def close(self) -> None:
        """Again: nothing."""
        self._socket.close()

    def _shake_hands(self, secret: Secret, deadline: float, tls: TlsFiles | None) -> Framer:
        certificate = b""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            try:
                wrapped = tls.client_context().wrap_socket(self._socket)
            except OSError as error:
                raise HandshakeFailed("failed", f"{self._where}: {error}") from error
            self._socket, certificate = wrapped, wrapped.getpeercert(binary_form=True) or b""
        handshake = Handshake(secret, "client", certificate)
        self._send(handshake.begin(), deadline)
        try:
            while not handshake.done:
                self._send(handshake.feed(self._receive(deadline)), deadline)
        except ChannelClosed as error:
            raise HandshakeFailed(
                "failed",
                f"{self._where} did not let this process in; do both have the same secret and certificates? ({error})",
            ) from error
        framer, rest = handshake.finish()
        self._arrived.extend(framer.feed(rest))
        return framer

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(_left_s(deadline))
            self._socket.sendall(data)
        except OSError as error:
            raise ChannelClosed(f"the connection to {self._where} failed: {error}") from error

    def _receive(self, deadline: float) -> bytes:
        try:
            self._socket.settimeout(_left_s(deadline))
            data = self._socket.recv(_CHUNK)
        except OSError as error:
            raise ChannelClosed(f"the connection to {self._where} failed: {error}") from error
        if not data:
            raise ChannelClosed(f"the connection to {self._where} was closed by the other side")
        return data


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)
