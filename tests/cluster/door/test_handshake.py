"""The handshake in memory: who gets in, and what was recorded, reflected or invented."""

from __future__ import annotations

import random

import pytest

from divisi.cluster.door import Handshake, HandshakeFailed, Secret
from tests.cluster.door.support import shake_hands


def test_both_sides_prove_and_speak_in_both_directions() -> None:
    secret = Secret.draw()
    client, server = shake_hands(Handshake(secret, "client", b"cert"), Handshake(secret, "server", b"cert"))
    assert server.feed(client.seal(b"question")) == [b"question"]
    assert client.feed(server.seal(b"answer")) == [b"answer"]


def test_a_client_with_another_secret_learns_nothing_and_is_refused() -> None:
    client, server = Handshake(Secret.draw(), "client"), Handshake(Secret.draw(), "server")
    challenge = server.feed(client.begin())
    with pytest.raises(HandshakeFailed, match=r"gang\.secret_file") as failed:
        server.feed(client.feed(challenge))
    assert failed.value.kind == "secret"
    assert len(challenge) == 40  # a greeting and a nonce: nothing that was computed with the secret


def test_a_server_with_another_secret_is_refused_by_the_client() -> None:
    secret = Secret.draw()
    client, server = Handshake(secret, "client"), Handshake(secret, "server")
    proof = client.feed(server.feed(client.begin()))
    right = server.feed(proof)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    with pytest.raises(HandshakeFailed, match="secret"):
        client.feed(wrong)


def test_a_recorded_handshake_opens_nothing() -> None:
    secret = Secret.draw()
    client, server = Handshake(secret, "client"), Handshake(secret, "server")
    hello = client.begin()
    proof = client.feed(server.feed(hello))
    server.feed(proof)
    assert server.done
    again = Handshake(secret, "server")
    assert again.feed(hello)
    with pytest.raises(HandshakeFailed):
        again.feed(proof)


def test_what_is_sent_back_to_its_sender_proves_nothing() -> None:
    """The client's own greeting and proof, reflected; and a server's challenge taken to a second connection of it."""
    secret = Secret.draw()
    client = Handshake(secret, "client")
    proof = client.feed(client.begin())
    with pytest.raises(HandshakeFailed):
        client.feed(proof)

    first, second = Handshake(secret, "server"), Handshake(secret, "server")
    hello = Handshake(secret, "client").begin()
    challenge = first.feed(hello)
    assert second.feed(challenge)  # the attacker greets with the first one's challenge
    with pytest.raises(HandshakeFailed):
        second.feed(challenge[8:])


def test_a_relay_with_a_certificate_of_its_own_is_found_out() -> None:
    secret = Secret.draw()
    client, server = Handshake(secret, "client", b"the relay's"), Handshake(secret, "server", b"the server's")
    challenge = server.feed(client.begin())
    with pytest.raises(HandshakeFailed):
        server.feed(client.feed(challenge))


def test_each_connection_has_keys_of_its_own_and_each_direction_too() -> None:
    secret = Secret.draw()
    pairs = [shake_hands(Handshake(secret, "client"), Handshake(secret, "server")) for _ in range(2)]
    frames = {framer.seal(b"same") for pair in pairs for framer in pair}
    assert len(frames) == 4


@pytest.mark.parametrize(
    ("start", "kind", "says"),
    [
        (b"GET / HTTP/1.1\r\n", "not ours", r"began with b'GET"),
        (b"\x16\x03\x01", "not ours", "no process of Divisi"),
        (b"divisi-2" + bytes(32), "version", "same version"),
        (bytes(1_000_000), "not ours", "no process"),
    ],
    ids=["http", "tls", "version", "zeros"],
)
@pytest.mark.parametrize("side", ["client", "server"])
def test_something_else_is_noticed_at_once(side: str, start: bytes, kind: str, says: str) -> None:
    handshake = Handshake(Secret.draw(), side)  # type: ignore[arg-type]
    with pytest.raises(HandshakeFailed, match=says) as failed:
        handshake.feed(start)
    assert failed.value.kind == kind


@pytest.mark.parametrize("seed", range(20))
def test_noise_gets_nobody_in(seed: int) -> None:
    draw = random.Random(seed)
    handshake = Handshake(Secret.draw(), "server")
    noise = (b"divisi-1" if seed % 2 else b"") + draw.randbytes(draw.randrange(80, 4096))
    with pytest.raises(HandshakeFailed):
        handshake.feed(noise)
    assert not handshake.done


@pytest.mark.parametrize("seed", range(20))
def test_a_handshake_may_be_cut_anywhere(seed: int) -> None:
    draw = random.Random(seed)
    secret = Secret.draw()
    client, server = Handshake(secret, "client"), Handshake(secret, "server")

    def give(receiver: Handshake, data: bytes) -> bytes:
        reply = b""
        while data:
            cut = draw.randint(1, len(data))
            reply += receiver.feed(data[:cut])
            data = data[cut:]
        return reply

    to_server = client.begin()
    while to_server:
        to_server = give(client, give(server, to_server))
    (a, _), (b, left) = client.finish(), server.finish()
    assert b.feed(left + a.seal(b"first")) == [b"first"]


def test_frames_right_behind_the_last_proof_are_kept() -> None:
    secret = Secret.draw()
    client, server = Handshake(secret, "client"), Handshake(secret, "server")
    last = server.feed(client.feed(server.feed(client.begin())))
    client.feed(last + server.finish()[0].seal(b"at once"))
    framer, left = client.finish()
    assert framer.feed(left) == [b"at once"]
