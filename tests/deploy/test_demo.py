"""The demo's clean-up: it notices a server that does not stop and processes that outlive it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from divisi.deploy.demo import DemoFailed, running_server

IDLE = "import time; time.sleep(60)"
LEAVES_A_CHILD = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {IDLE!r}], start_new_session=True)
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(60)
"""


def read_pid(path: Path) -> int:
    for _ in range(200):
        if path.exists() and (text := path.read_text()).strip():
            return int(text)
        time.sleep(0.05)
    raise AssertionError("the child did not start")


def test_a_clean_stop() -> None:
    with running_server([sys.executable, "-c", IDLE]) as (server, _):
        assert server.poll() is None
    assert server.returncode == -signal.SIGTERM


def test_processes_left_behind_are_found_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with (
        pytest.raises(DemoFailed, match="left processes behind"),
        running_server([sys.executable, "-c", LEAVES_A_CHILD, str(path)], exit_timeout_s=0.2),
    ):
        pid = read_pid(path)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); open({str(ready)!r}, 'w').write('1'); {IDLE}"
    with (
        pytest.raises(DemoFailed, match="did not stop"),
        running_server([sys.executable, "-c", code], stop_timeout_s=0.2) as (server, _),
    ):
        read_pid(ready)
    assert server.returncode == -signal.SIGKILL


def test_a_failure_inside_is_not_hidden_by_the_clean_up(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with (
        pytest.raises(subprocess.SubprocessError, match="mine"),
        running_server([sys.executable, "-c", LEAVES_A_CHILD, str(path)], exit_timeout_s=0.2),
    ):
        raise subprocess.SubprocessError(f"mine {read_pid(path)}")


def test_the_server_is_shown_and_its_ready_line_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    with running_server([sys.executable, "-c", f"print('Ready. Try', flush=True); {IDLE}"]) as (_, announced):
        assert announced.wait(20)
    assert "   | Ready. Try\n" in capfd.readouterr().out
