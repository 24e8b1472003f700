"""Where the doors are: private sockets, a port only where others can come, and nothing of killed processes."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from divisi.cluster.seats import Address, StreamAddress
from divisi.cluster.streams.places import stream_address, stream_places
from tests.support.scripted_worker import SECRET, ScriptedWorker


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="d") as name:  # pytest's own is too long for a socket's path
        monkeypatch.setattr(tempfile, "gettempdir", lambda: name)
        yield Path(name)


def test_what_others_can_reach_has_a_port(folder: Path) -> None:
    assert [type(place) for place in stream_places("10.0.0.7")] == [type(folder), Address]
    (path,) = stream_places("127.0.0.1")
    assert isinstance(path, Path)
    assert stream_places("127.0.0.1") != [path], "two of one process do not meet"
    assert stream_address("10.0.0.7", [path, Address("10.0.0.7", 99)]) == StreamAddress("10.0.0.7", 99, str(path))
    assert stream_address("127.0.0.1", [path]) == StreamAddress("127.0.0.1", 0, str(path))


def test_only_the_owner_gets_in(folder: Path) -> None:
    worker = ScriptedWorker()
    (place,) = worker.server.start(stream_places("127.0.0.1"), SECRET)
    assert isinstance(place, Path)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    worker.server.close()
    assert not place.exists()


def test_a_long_folder_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: f"/tmp/{'long' * 30}")
    (place,) = stream_places("127.0.0.1")
    assert len(os.fsencode(str(place))) < 100


def test_sockets_of_killed_processes_are_removed_and_no_others(folder: Path) -> None:
    (mine,) = stream_places("127.0.0.1")
    assert isinstance(mine, Path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    orphan, elsewhere = (mine.with_name(f"{ended.pid}-{name}") for name in ("orphan", "elsewhere"))
    with socket.socket(socket.AF_UNIX) as own, socket.socket(socket.AF_UNIX) as listening:
        own.bind(str(mine))
        listening.bind(str(elsewhere))  # in another container, whose processes have other numbers
        listening.listen()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(orphan))
        mine.with_name("something else").touch()
        stream_places("127.0.0.1")
    assert sorted(path.name for path in mine.parent.iterdir()) == sorted([mine.name, elsewhere.name, "something else"])
