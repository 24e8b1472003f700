"""The configuration that HAProxy gets: Ray's own, without what opens, tells or keeps more than it should."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from divisi.deploy.haproxy.config import ConfigError, Place, confine
from divisi.deploy.haproxy.environment import environment
from tests.deploy.haproxy.conftest import Manager

SHORT = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /d/admin.sock mode 666 level admin expose-fd listeners
defaults
    option idle-close-on-response
    errorfile 502 /d/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
backend default_backend
    http-request return status 404 content-type text/plain lf-string "none"
backend http-divisi
    server a 127.0.0.1:30000 check
    server b 127.0.0.1:8500 check backup
listen stats
  bind *:8404
"""


def lines(manager: Manager) -> list[str]:
    (file,) = manager.folder.glob("*/haproxy.cfg")
    return [line.strip() for line in file.read_text().splitlines()]


def test_what_ray_writes_is_confined(manager: Manager) -> None:
    config = lines(manager)
    assert [line for line in config if "bind" in line.split()] == [f"bind 127.0.0.1:{manager.url.rpartition(':')[2]}"]
    assert not [line for line in config if line.startswith("log ") and line != "log global"]
    assert [line for line in config if "stats" in line and not line.startswith("stats socket")] == ["stats timeout 30s"]
    assert not [line for line in config if "backup" in line or "idle-close" in line]
    (admin,) = [line for line in config if line.startswith("stats socket")]
    assert admin.split()[3:5] == ["mode", "600"]
    assert {"nbthread 1", "tune.bufsize 69632", "timeout http-request 60s", "option http-no-delay"} <= set(config)
    (health,) = [line for line in config if line.startswith("default-server")]
    assert "inter 500ms" in health


def test_silence_is_as_long_as_an_answer_may_be(manager: Manager) -> None:
    longest = {}
    for line in lines(manager):
        if found := re.fullmatch(r"(timeout (?:client|server)|hard-stop-after) (\d+)s", line):
            longest[found[1]] = int(found[2])
    assert set(longest) == {"timeout client", "timeout server", "hard-stop-after"}
    assert min(longest.values()) > 24 * 3600  # answers have no limit here
    told = environment(Path("/f"), Path("/f/haproxy"), range(30000, 30300), longest_answer_s=7200.0)
    assert int(told["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) > 7200


def test_all_files_are_the_users_own(manager: Manager) -> None:
    assert stat.S_IMODE(manager.folder.stat().st_mode) == 0o700
    sockets = [path for path in manager.folder.rglob("*") if path.is_socket()]
    assert len(sockets) == 1
    assert stat.S_IMODE(sockets[0].stat().st_mode) == 0o600
    assert all(path.stat().st_uid == os.getuid() for path in manager.folder.rglob("*"))


@pytest.mark.parametrize(("host", "bind"), [("0.0.0.0", "0.0.0.0:9"), ("::1", "[::1]:9")])
def test_the_address_is_ours_to_choose(host: str, bind: str) -> None:
    config = confine(SHORT, Place(host, 9, "/d"))
    assert re.findall(r"bind .*", config) == [f"bind {bind}"]
    assert "errorfile 503 /d/answer-503.http" in config
    assert "8404" not in config
    assert "9101" not in config
    assert "8500" not in config


@pytest.mark.parametrize("change", [
    ("    log 127.0.0.1:514 local0 info\n", ""),
    ("mode 666", "mode 660"),
    ("status 404", "status 405"),
    ("    errorfile 502 /d/500.http\n", ""),
    ("    option idle-close-on-response\n", ""),
    ("    bind 127.0.0.1:8000\n", "    bind-to 127.0.0.1:8000\n"),
    ("    server a", "    bind *:1\n    server a"),
    ("global\n", " global\n"),
])  # fmt: skip
def test_a_configuration_that_is_not_as_it_was_is_refused(change: tuple[str, str]) -> None:
    assert change[0] in SHORT
    with pytest.raises(ConfigError):
        confine(SHORT.replace(*change), Place("127.0.0.1", 8000, "/d"))
