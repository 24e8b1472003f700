"""Who has lost Ray's head ends, and nobody else."""

from __future__ import annotations

import socket
import threading
import time

from divisi.cluster.ray.head import watch


def start(address: str) -> threading.Event:
    ended = threading.Event()
    threading.Thread(target=watch, args=(address, 0.4, ended.set, 0.05), daemon=True).start()
    return ended


def test_it_ends_once_the_head_is_gone_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        host, port = head.getsockname()
        ended = start(f"{host}:{port}")
        assert not ended.wait(0.8), "the head is there"
    begin = time.monotonic()
    assert ended.wait(5)
    assert time.monotonic() - begin > 0.2


def test_a_head_that_comes_back_in_time_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        host, port = head.getsockname()
        ended = start(f"{host}:{port}")
        time.sleep(0.1)
    time.sleep(0.15)
    with socket.create_server((host, port)):
        assert not ended.wait(0.8)
