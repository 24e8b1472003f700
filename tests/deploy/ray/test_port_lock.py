"""The port lock: one holder of an address and port, whoever the others are, and freed however the holder ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from multiprocessing.synchronize import Barrier, Event

import pytest

from divisi.deploy.ray.port_lock import PortTaken, hold_port

HOLD = """
import sys
from divisi.deploy.ray.port_lock import hold_port
with hold_port("127.0.0.1", int(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("first", "second", "conflict"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "::", True),
        ("0.0.0.0", "::", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "::1", False),
        ("127.0.0.1", "::1", False),
    ],
)
def test_all_addresses_conflict_with_each(port: int, first: str, second: str, conflict: bool) -> None:
    if ":" in first + second and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with hold_port(first, port):
        if conflict:
            with pytest.raises(
                PortTaken, match=rf"held by process {os.getpid()} \(.*\); stop it, or give another --port"
            ):
                hold_port(second, port).__enter__()
        else:
            with hold_port(second, port):
                pass
    with hold_port(second, port):
        pass


def test_servers_on_different_ports_leave_each_other_alone(port: int) -> None:
    with closing(socket.socket()) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        with hold_port("127.0.0.1", port), hold_port("127.0.0.1", free.getsockname()[1]):
            pass


def _take(host: str, port: int, begin: Barrier, end: Event, outcomes: multiprocessing.Queue[tuple[int, str]]) -> None:
    begin.wait()
    try:
        with hold_port(host, port):
            outcomes.put((os.getpid(), ""))
            end.wait()
    except PortTaken as error:
        outcomes.put((os.getpid(), str(error)))


@pytest.mark.parametrize("hosts", [("127.0.0.1",) * 6, ("127.0.0.1", "0.0.0.0") * 3], ids=["same", "one and all"])
def test_of_those_that_start_together_exactly_one_gets_it(port: int, hosts: tuple[str, ...]) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        begin, end, outcomes = context.Barrier(len(hosts)), context.Event(), context.Queue()
        processes = [context.Process(target=_take, args=(host, port, begin, end, outcomes)) for host in hosts]
        for process in processes:
            process.start()
        said = dict(outcomes.get(timeout=30) for _ in hosts)
        end.set()
        for process in processes:
            process.join(30)
        (winner,) = (pid for pid, error in said.items() if not error)
        assert all(f"held by process {winner} (" in error for error in said.values() if error)


def test_the_lock_ends_with_its_holder_however_that_ends(port: int) -> None:
    command = [sys.executable, "-c", HOLD, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(PortTaken, match=f"held by process {holder.pid} "):
            hold_port("127.0.0.1", port).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait(30)
        with hold_port("127.0.0.1", port):
            pass


@pytest.mark.parametrize("option", [0, socket.SO_REUSEADDR, socket.SO_REUSEPORT], ids=["plain", "address", "port"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_server_without_the_lock_is_noticed(option: int, host: str) -> None:
    with closing(socket.socket()) as server:
        if option:
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(PortTaken, match=f"held by process {os.getpid()} "):
            hold_port(host, server.getsockname()[1]).__enter__()


@pytest.mark.parametrize("reusable", [True, False])
def test_connections_that_a_former_server_left_are_no_server(reusable: bool) -> None:
    with closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reusable))
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = server.getsockname()
        with closing(socket.create_connection(address)) as client:
            server.accept()[0].close()  # who closes first keeps the connection in TIME_WAIT
            assert client.recv(1) == b""
    if reusable:  # as Ray Serve's
        with hold_port(*address):
            pass
    else:
        with pytest.raises(PortTaken, match="these end within a minute"):
            hold_port(*address).__enter__()


@pytest.mark.parametrize(
    ("host", "words"), [("nowhere.invalid", r"http\.host: 'nowhere\.invalid'"), ("192.0.2.77", "cannot listen on")]
)
def test_addresses_that_are_not_this_machines(host: str, words: str) -> None:
    with pytest.raises(PortTaken, match=words):
        hold_port(host, 18000).__enter__()


def test_a_free_port_needs_no_lock() -> None:
    with hold_port("127.0.0.1", 0), hold_port("127.0.0.1", 0):
        pass
