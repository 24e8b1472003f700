"""Who has no business at a port: without the secret, with another one, with what was recorded, or with noise."""

from __future__ import annotations

import contextlib
import random
import socket
import time

from divisi.cluster.door import DoorError, Handshake, Secret
from divisi.cluster.seats import Address


def silent(place: Address) -> socket.socket:
    """Says nothing."""
    return _connected(place)


def with_another_secret(place: Address) -> socket.socket:
    """Goes through the whole handshake."""
    connection, handshake = _connected(place), Handshake(Secret(b"?" * 32), "client")
    with contextlib.suppress(OSError, DoorError):
        connection.sendall(handshake.begin())
        connection.sendall(handshake.feed(connection.recv(4096)))
    return connection


def with_a_recorded_hello(place: Address, recorded: bytes) -> socket.socket:
    """Repeats all that a peer who knows the secret has sent."""
    connection = _connected(place)
    with contextlib.suppress(OSError):
        connection.sendall(recorded)
    return connection


def with_noise(place: Address, size: int = 2**20) -> socket.socket:
    """Sends a megabyte as fast as it is taken."""
    connection, data = _connected(place), random.Random(1).randbytes(size)
    connection.settimeout(0.5)
    with contextlib.suppress(OSError):
        connection.sendall(data)
    return connection


def is_closed(connection: socket.socket, within_s: float = 5.0) -> bool:
    """Whether the other side ends the connection."""
    connection.settimeout(0.1)
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if not connection.recv(4096):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def recorded_by(place: Address, secret: Secret) -> bytes:
    """What a peer that knows the secret sends until it is inside."""
    sent: list[bytes] = []

    class Recording(socket.socket):
        def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
            sent.append(bytes(data))
            super().sendall(data, flags)

    handshake, connection = Handshake(secret, "client"), Recording(socket.AF_INET)
    connection.settimeout(5)
    connection.connect((place.host, place.port))
    with connection:
        connection.sendall(handshake.begin())
        while not handshake.done:
            if reply := handshake.feed(connection.recv(4096)):
                connection.sendall(reply)
    return b"".join(sent)


def _connected(place: Address) -> socket.socket:
    return socket.create_connection((place.host, place.port), timeout=5)
