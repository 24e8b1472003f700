"""What a stranger can and cannot do at gloo's own sockets, which are behind no door and so need their own network."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from divisi.cluster.dispatch.transport.gloo_sockets import GlooSockets
from divisi.cluster.dispatch.transport.groups import PeerGroup, join_group
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.errors import StepAborted
from divisi.cluster.seats import Address, GangShape, Membership
from tests.support.credentials import CREDENTIALS

HOST, CPU = "127.0.0.1", torch.device("cpu")
SHAPE = GangShape(1, 1)
Open = Callable[[int], list[PeerGroup]]


@pytest.fixture
def listeners(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ports of gloo's listeners, as they are made; a port scan finds them as well."""
    ports: list[int] = []
    init = GlooSockets.__init__

    def noting(self: GlooSockets, host: str) -> None:
        init(self, host)
        ports.append(int(self.told))

    monkeypatch.setattr(GlooSockets, "__init__", noting)
    return ports


@pytest.fixture
def form(listeners: list[int]) -> Iterator[Open]:
    """Forms the group of an epoch."""
    store = StoreServer(HOST, CREDENTIALS)
    formed: list[PeerGroup] = []

    def form(epoch: int) -> list[PeerGroup]:
        membership = Membership(epoch, SHAPE, ("a", "b"), (Address(HOST),) * 2, store.address)
        with ThreadPoolExecutor(2) as pool:
            groups = list(pool.map(lambda rank: join_group(membership, rank, CPU, 10.0, CREDENTIALS), range(2)))
        formed.extend(groups)
        return groups

    yield form
    for group in formed:
        group.close()


def exchange(groups: list[PeerGroup], deadline_s: float = 10.0) -> None:
    """A message each way arrives as it was sent. Raises StepAborted."""
    sent = [torch.randint(256, (50_000,), dtype=torch.uint8) for _ in groups]
    got = [torch.zeros_like(data) for data in sent]
    transfers = [group.send(data, 1 - rank) for rank, (group, data) in enumerate(zip(groups, sent, strict=True))]
    transfers += [group.recv(data, 1 - rank) for rank, (group, data) in enumerate(zip(groups, got, strict=True))]
    for transfer in transfers:
        transfer.wait(time.monotonic() + deadline_s)
    assert torch.equal(got[1], sent[0])
    assert torch.equal(got[0], sent[1])


def place(number: int) -> bytes:
    """All that gloo asks of who connects: the number of a connection that it expects, counted from 0."""
    return struct.pack("<q", number)


@pytest.mark.parametrize(
    "said",
    [b"", b"\0", random.Random(1).randbytes(2**20), *map(place, range(4))],
    ids=["nothing", "a byte", "a megabyte of noise", *(f"place {n}" for n in range(4))],
)
def test_a_group_that_stands_is_not_disturbed(form: Open, listeners: list[int], said: bytes) -> None:
    """Who comes later is let in, is told nothing, and changes nothing."""
    groups = form(1)
    exchange(groups)
    strangers = [socket.create_connection((HOST, port), timeout=5) for port in listeners]
    for stranger in strangers:
        stranger.settimeout(0.2)
        with stranger:
            stranger.sendall(said)
            exchange(groups)
            with pytest.raises(TimeoutError):
                stranger.recv(1)
    exchange(groups)


def test_who_comes_first_takes_a_peers_place_and_hears_what_is_meant_for_it(
    form: Open, listeners: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight bytes are enough while a group forms. The step aborts by its deadline, and the next epoch has new ports."""
    strangers: list[socket.socket] = []
    listening = GlooSockets.__init__

    def beaten(self: GlooSockets, host: str) -> None:
        listening(self, host)
        for number in range(4):
            strangers.append(socket.create_connection((HOST, int(self.told)), timeout=5))
            strangers[-1].sendall(place(number))

    with monkeypatch.context() as patch:
        patch.setattr(GlooSockets, "__init__", beaten)
        groups = form(1)
    with pytest.raises(StepAborted, match="transfer failed"):
        exchange(groups, deadline_s=0.5)
    heard = b""
    for stranger in strangers:
        stranger.settimeout(0.1)
        try:
            heard += stranger.recv(4096)
        except TimeoutError:
            continue
        finally:
            stranger.close()
    assert heard, "it is no peer of anybody's, and is spoken to"
    again = form(2)
    assert set(listeners[2:]).isdisjoint(listeners[:2])
    exchange(again)
