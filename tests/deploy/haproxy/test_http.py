"""HTTP through HAProxy, as it is started for us: nothing is held back, changed or cut; its own words are JSON."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.deploy.haproxy.conftest import Manager, Replica, managed, running

SOON_S = 5.0


@contextmanager
def connection(manager: Manager) -> Iterator[socket.socket]:
    host, _, port = manager.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=SOON_S) as client:
        yield client


def read_until(client: socket.socket, end: bytes) -> bytes:
    said = b""
    while not said.endswith(end):
        piece = client.recv(65536)
        assert piece, said
        said += piece
    return said


def whole(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body until the connection ends."""
    said = b""
    while piece := client.recv(65536):
        said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    return head, body


def test_events_come_one_by_one_and_a_client_that_leaves_is_noticed(manager: Manager, replica: Replica) -> None:
    replica.left.clear()
    with connection(manager) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(client, b"\r\n\r\n")
        for _ in range(3):
            replica.next()
            assert b"data: x\n\n" in read_until(client, b"\r\n")
            time.sleep(0.05)  # longer than HAProxy would wait to send two at once
    begin = time.monotonic()
    assert replica.left.wait(SOON_S)  # although nothing was sent meanwhile
    assert time.monotonic() - begin < 1.0


def test_a_request_comes_as_it_was_sent(manager: Manager) -> None:
    with httpx.Client(base_url=manager.url, timeout=SOON_S) as client:
        told = client.post("/echo", content=b"x" * (12 * 2**20), headers={"X-Request-Id": "mine"})
        assert told.headers["x-request-id"] == "mine"
        assert told.json()["size"] == 12 * 2**20
        assert told.json()["headers"]["x-request-id"] == "mine"
        chunked = client.post("/echo", content=iter([b"ab", b"cde"])).json()
        assert chunked["size"] == 5
        assert client.get("/echo").headers["x-request-id"] == "its own"
        head = client.head("/echo")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0


def test_a_head_of_64_kib_gets_through_and_a_longer_one_is_refused(manager: Manager) -> None:
    with httpx.Client(base_url=manager.url, timeout=SOON_S) as client:
        headers = {f"x-{place}": "y" * 8000 for place in range(8)}
        assert len(client.get("/echo", headers=headers).json()["headers"]["x-7"]) == 8000
        assert client.get("/echo", headers=headers | {"x-more": "y" * 8000}).status_code == 400
    with connection(manager) as client:
        client.sendall(b"no http at all\r\n\r\n")
        assert whole(client)[0].startswith(b"HTTP/1.1 400 ")


def test_connections_are_kept_unless_the_client_is_an_old_one(manager: Manager) -> None:
    with connection(manager) as client:
        for _ in range(2):
            client.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(client, b"}")
    with connection(manager) as client:
        client.sendall(b"GET /echo HTTP/1.0\r\n\r\n")
        head, body = whole(client)
        assert head.startswith((b"HTTP/1.0 200", b"HTTP/1.1 200"))
        assert json.loads(body)["method"] == "GET"


def test_without_a_replica_it_says_so_in_openais_shape(replica: Replica) -> None:
    with managed() as manager, httpx.Client(base_url=manager.url, timeout=SOON_S) as client:
        refused = client.post("/v1/completions", json={})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "no_ingress"
        assert refused.json()["error"]["message"]
        manager.tell(replica.port)
        assert client.get("/echo").status_code == 200
        with running(Replica()) as other:
            manager.tell(replica.port, other.port)
            assert {client.get("/echo").json()["port"] for _ in range(8)} == {replica.port, other.port}
        # The other is gone and HAProxy has not noticed yet: a connection that is refused goes to the next.
        assert {client.get("/echo").json()["port"] for _ in range(8)} == {replica.port}


@pytest.mark.verify
def test_streams_outlive_a_change_of_replicas_and_a_killed_manager(replica: Replica) -> None:
    with managed(replica.port) as manager, connection(manager) as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(client, b"\r\n\r\n")
        pids = [manager.pid]
        manager.tell(replica.port)
        pids.append(manager.pid)
        assert manager.process is not None
        os.kill(manager.process.pid, signal.SIGKILL)
        manager.process.wait()
        assert httpx.get(f"{manager.url}/echo", timeout=SOON_S).status_code == 200
        manager.replicas = []  # Ray tells a new manager later
        manager.start()  # nothing else can listen: it takes over from the one that was left alone
        pids.append(manager.pid)
        assert len(set(pids)) == 3
        replica.next()
        assert b"data: x\n\n" in read_until(client, b"\r\n")
        assert httpx.get(f"{manager.url}/echo", timeout=SOON_S).json()["port"] == replica.port


def test_a_new_manager_serves_with_the_replicas_that_the_last_one_knew(replica: Replica) -> None:
    with managed(replica.port) as manager:
        for blow in (signal.SIGKILL, signal.SIGTERM):
            assert manager.process is not None
            os.kill(manager.process.pid, signal.SIGKILL)
            manager.process.wait()
            if blow == signal.SIGTERM:
                os.kill(manager.pid, blow)  # HAProxy is gone as well
            manager.replicas = []
            manager.start()
            assert httpx.get(f"{manager.url}/echo", timeout=SOON_S).status_code == 200
        manager.tell()
        assert httpx.get(f"{manager.url}/echo", timeout=SOON_S).status_code == 503


@pytest.mark.verify
@pytest.mark.timeout(300)
def test_a_stream_may_be_silent_for_minutes(manager: Manager, replica: Replica) -> None:
    with connection(manager) as client:
        client.settimeout(SOON_S + 200)
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(client, b"\r\n\r\n")
        time.sleep(150)  # silence itself is what is tested; the usual limits are 30, 60 and 120 s
        replica.next()
        assert b"data: x\n\n" in read_until(client, b"\r\n")
