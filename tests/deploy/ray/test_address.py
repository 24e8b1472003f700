"""Which cluster a server joins, who says so, and that a wrong address is refused in one sentence and soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from divisi.deploy.ray.address import ClusterAddress, find_cluster, short_temp_dir
from divisi.deploy.ray.start_errors import StartFailed
from divisi.deploy.settings import SettingsError, Surroundings


@pytest.fixture
def surroundings(tmp_path: Path) -> Surroundings:
    (tmp_path / "ray").mkdir()
    return Surroundings(ray_address=None, temp_dir=tmp_path, temp_dir_variable="TMPDIR", state_home=tmp_path)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody gets while the test runs."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def recorded(surroundings: Surroundings, content: str) -> Path:
    """The file in which `ray start` leaves its cluster's address."""
    file = surroundings.temp_dir / "ray" / "ray_current_cluster"
    file.write_text(content)
    return file


def test_without_a_cluster_one_is_started(surroundings: Surroundings) -> None:
    assert find_cluster(surroundings) is None


def test_the_variable_wins_over_the_file_and_is_named(surroundings: Surroundings) -> None:
    recorded(surroundings, "10.0.0.1:6379")
    found = find_cluster(replace(surroundings, ray_address="10.0.0.2:6380"))
    assert found is not None
    assert (found.address, found.source) == ("10.0.0.2:6380", "the environment variable RAY_ADDRESS")


@pytest.mark.parametrize("variable", [None, "auto"])
def test_the_file_of_ray_start_is_followed_and_named(surroundings: Surroundings, variable: str | None) -> None:
    file = recorded(surroundings, "10.0.0.1:6379\n")
    found = find_cluster(replace(surroundings, ray_address=variable))
    assert found is not None
    assert found.address == "10.0.0.1:6379"
    assert str(file) in found.source
    assert "remove the file" in found.remedy


def test_local_starts_one_whatever_the_file_says(surroundings: Surroundings) -> None:
    recorded(surroundings, "10.0.0.1:6379")
    assert find_cluster(replace(surroundings, ray_address="local")) is None


def test_auto_needs_a_cluster(surroundings: Surroundings) -> None:
    with pytest.raises(SettingsError, match=r"RAY_ADDRESS=auto, but .*ray_current_cluster; start a cluster"):
        find_cluster(replace(surroundings, ray_address="auto"))


def test_a_file_that_is_no_text_is_named(surroundings: Surroundings) -> None:
    recorded(surroundings, "").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SettingsError, match=r"ray_current_cluster, .*cannot be read .*it is no text"):
        find_cluster(surroundings)


@pytest.mark.parametrize("content", ["", "6379", "host:", ":6379", "host:0", "host:70000", "host:port"])
def test_what_is_no_address_is_refused_by_name(surroundings: Surroundings, content: str) -> None:
    recorded(surroundings, content)
    found = find_cluster(surroundings)
    assert found is not None
    with pytest.raises(SettingsError, match=r"ray_current_cluster.*is not HOST:PORT; .*remove the file"):
        found.check()


def test_the_ray_client_is_refused(surroundings: Surroundings) -> None:
    found = find_cluster(replace(surroundings, ray_address="ray://10.0.0.1:10001"))
    assert found is not None
    with pytest.raises(SettingsError, match=r"RAY_ADDRESS.*Ray Client; give HOST:PORT"):
        found.check()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "nowhere.invalid"])
def test_an_address_that_nobody_listens_at(surroundings: Surroundings, closed_port: int, host: str) -> None:
    found = find_cluster(replace(surroundings, ray_address=f"{host}:{closed_port}"))
    assert found is not None
    begin = time.monotonic()
    with pytest.raises(
        StartFailed, match=rf"no Ray cluster at {host}:\d+, which .*RAY_ADDRESS names \(.*\); correct it"
    ):
        found.check()
    assert time.monotonic() - begin < 5


def test_an_address_that_does_not_answer(surroundings: Surroundings) -> None:
    with closing(socket.socket()) as listener, ExitStack() as clients:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # beyond its queue the kernel drops connections, as a firewall does
            client = clients.enter_context(closing(socket.socket()))
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        address = "{}:{}".format(*listener.getsockname())
        with pytest.raises(StartFailed, match=r"names \(no answer\); start it again"):
            ClusterAddress(address, "a file", "start it again").check(timeout_s=0.2)


def test_a_listener_passes() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        ClusterAddress(f"127.0.0.1:{listener.getsockname()[1]}", "a file", "").check()


@pytest.mark.parametrize(("length", "short"), [(4, False), (39, False), (60, True), (150, True)])
def test_a_folder_too_long_for_sockets_is_not_used(surroundings: Surroundings, length: int, short: bool) -> None:
    found = short_temp_dir(replace(surroundings, temp_dir=Path("/" + "x" * (length - 1))))
    assert (found is not None) == short
    assert found in (None, Path("/tmp/ray"))


@pytest.mark.parametrize("name", ["file", "file/below", "file/" + "x" * 100])
def test_a_folder_that_is_none_is_refused_by_name(surroundings: Surroundings, name: str) -> None:
    (surroundings.temp_dir / "file").touch()
    with pytest.raises(SettingsError, match=r"^TMPDIR: .*/file is no folder; .*RAY_TMPDIR"):
        short_temp_dir(replace(surroundings, temp_dir=surroundings.temp_dir / name))


def test_the_length_of_a_folder_counts_in_bytes(surroundings: Surroundings) -> None:
    assert short_temp_dir(replace(surroundings, temp_dir=Path("/" + "é" * 30))) is not None
