"""Both ends of a connection without a socket, and doors for tests."""

from __future__ import annotations

from divisi.cluster.door import Framer, Handshake, Secret


def shake_hands(client: Handshake, server: Handshake) -> tuple[Framer, Framer]:
    """The framers of client and server after a handshake in memory."""
    to_server = client.begin()
    while to_server:
        to_client = server.feed(to_server)
        to_server = client.feed(to_client)
    assert client.done
    assert server.done
    return client.finish()[0], server.finish()[0]


def framers() -> tuple[Framer, Framer]:
    """A client's and a server's, of one connection."""
    secret = Secret.draw()
    return shake_hands(Handshake(secret, "client"), Handshake(secret, "server"))
