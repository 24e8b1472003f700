"""The store through which the ranks of an epoch meet, and who is kept out of it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from divisi.cluster.dispatch.transport.door_store import DoorStore
from divisi.cluster.dispatch.transport.rendezvous import StoreServer
from divisi.cluster.door import Credentials, Secret
from tests.support import strangers
from tests.support.credentials import CREDENTIALS


@pytest.fixture(scope="module")
def server() -> StoreServer:
    return StoreServer("127.0.0.1", CREDENTIALS)


def client(server: StoreServer, epoch: int = 1, timeout_s: float = 5.0) -> DoorStore:
    return DoorStore(server.address, epoch, CREDENTIALS, timeout_s)


def test_what_one_tells_another_reads(server: StoreServer) -> None:
    one, other = client(server, 10), client(server, 10)
    assert not other.check(["a"])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.get, "a")
        one.set("a", b"\0binary\xff")
        assert waiting.result(5) == b"\0binary\xff"
    one.set("b", "text")
    other.wait(["a", "b"])
    assert other.check(["a", "b"])
    assert not other.check(["a", "c"])


def test_waits_end_at_their_time(server: StoreServer) -> None:
    store = client(server, 11, timeout_s=0.1)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="nobody told x"):
        store.get("x")
    with pytest.raises(RuntimeError, match=r"within 0\.05 s"):
        store.wait(["x"], timedelta(seconds=0.05))
    assert time.monotonic() - begin < 3.0


def test_epochs_do_not_hear_each_other_and_old_ones_are_forgotten(server: StoreServer) -> None:
    old, new = client(server, 20), client(server, 21)
    old.set("a", "1")
    assert not new.check(["a"])
    new.set("b", "2")
    assert old.check(["a"]), "who is late can still read"
    for epoch in range(22, 25):
        client(server, epoch).set("c", "3")
    assert not old.check(["a"])
    old.set("d", "4")
    assert not old.check(["d"]), "an epoch that is long over keeps nothing"
    assert new.get("b") == b"2"


def test_strangers_are_refused_and_nobody_is_disturbed(server: StoreServer, caplog: pytest.LogCaptureFixture) -> None:
    store, place = client(server, 30), server.address
    recorded = strangers.recorded_by(place, CREDENTIALS.secret)
    caplog.set_level(logging.WARNING)
    callers = [
        strangers.silent(place),
        strangers.with_another_secret(place),
        strangers.with_a_recorded_hello(place, recorded),
        strangers.with_noise(place),
    ]
    for number in range(50):
        store.set(f"key {number}", str(number))
        assert store.get(f"key {number}") == str(number).encode()
    assert all(strangers.is_closed(caller) for caller in callers)
    refused = [record.getMessage() for record in caplog.records if "refused a connection" in record.getMessage()]
    for kind in ("did not prove", "does not know this gang's secret", "is no process of Divisi"):
        assert any(kind in line for line in refused), (kind, refused)
    assert store.get("key 0") == b"0"


def test_another_secret_is_told_what_is_wrong(server: StoreServer) -> None:
    with pytest.raises(RuntimeError, match="same secret"):
        DoorStore(server.address, 1, Credentials(Secret(b"?" * 32)), 5.0)


def test_nobody_gets_in_once_it_is_closed() -> None:
    server = StoreServer("127.0.0.1", CREDENTIALS)
    store = client(server)
    store.set("a", b"b")
    server.close()
    with pytest.raises(RuntimeError):
        client(server, timeout_s=1.0)
    with pytest.raises(RuntimeError):
        store.get("a")
