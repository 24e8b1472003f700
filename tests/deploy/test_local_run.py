"""`divisi serve` in the foreground: a curl line that can be pasted, and starts that end in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from divisi.deploy import local_run
from divisi.deploy.local_run import _ready_text
from divisi.deploy.settings import Settings
from divisi.model.random_checkpoint import write_random_checkpoint

OWN_RAY = """
import subprocess, sys, threading
import ray
from divisi.deploy.ray.interruptible import Interruptible
from divisi.deploy.ray.instance import Told, Wish, ray_instance
from divisi.deploy.settings.groups import HttpSettings
from divisi.deploy.settings import Surroundings
wish = Wish("divisi", HttpSettings(port=0), ranks=1)
told = Told(lambda joined: None, lambda folder: None, print)
with ray_instance(wish, Surroundings.read(), Interruptible(threading.Event()), told) as instance:
    assert instance.own, "joined the instance of another divisi serve"
"""
SECOND = OWN_RAY + "    print(len(ray.nodes()))"
FIRST = OWN_RAY + f"    subprocess.run([sys.executable, '-c', {SECOND!r}], check=True)"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    write_random_checkpoint(folder, None, 0)
    return folder


@contextmanager
def serving(model_dir: Path, port: int, *flags: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server as a child process, which is killed if the test has not ended it."""
    command = [sys.executable, "-m", "divisi.deploy.cli", "serve", str(model_dir), "--port", str(port), *flags]
    env = os.environ | {"RAY_ADDRESS": "", "XDG_STATE_HOME": str(model_dir.parent), **environment}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(process: subprocess.Popen[str], status: int) -> str:
    """The one line of error that a server ends with."""
    _, said = process.communicate(timeout=100)
    assert process.returncode == status, said
    assert "Traceback" not in said
    line = said.splitlines()[-1]
    assert line.startswith(f"divisi: {'error' if status == 2 else 'failed'}: ")
    return line


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("example.org",) * 2]
)
def test_the_ready_line_can_be_pasted(host: str, url: str) -> None:
    name = """it's "new" $HOME"""
    http = {"host": host, "port": 9000, "served_model_name": name}
    text = _ready_text(Settings.from_args({"model": {"model_dir": "/m"}, "http": http}))
    command = shlex.split(text.splitlines()[1])
    assert command[:2] == ["curl", f"http://{url}:9000/v1/chat/completions"]
    assert json.loads(command[-1])["model"] == name


def test_a_second_server_leaves_the_first_ones_ray_alone() -> None:
    subprocess.run([sys.executable, "-c", FIRST], check=True, timeout=120, env=os.environ | {"RAY_ADDRESS": ""})


def test_more_gpus_than_there_are(model_dir: Path, port: int) -> None:
    flags = ("--device", "cuda", "--attention-workers", "60", "--expert-shards", "4")
    with serving(model_dir, port, *flags) as process:
        assert "64 in all" in refused(process, 1)


def test_a_port_that_another_program_has(model_dir: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with serving(model_dir, port) as process:
            assert f"127.0.0.1:{port} is held by process {os.getpid()} (" in refused(process, 2)


def test_of_two_that_start_in_the_same_second_one_serves(model_dir: Path, port: int) -> None:
    with serving(model_dir, port) as one, serving(model_dir, port) as other:
        first, rest = ended_first(one, other)
        holder = re.search(rf"127\.0\.0\.1:{port} is held by process (\d+) \(", refused(first, 2))
        assert holder is not None
        assert rest.pid in lineage(int(holder[1]))
        assert rest.poll() is None
        rest.send_signal(signal.SIGINT)  # while it starts
        _, said = rest.communicate(timeout=60)
        assert rest.returncode == 0, said
        assert "Traceback" not in said


def lineage(pid: int) -> set[int]:
    """A process and those above it."""
    process = psutil.Process(pid)
    return {pid, *(parent.pid for parent in process.parents())}


def ended_first(one: subprocess.Popen[str], other: subprocess.Popen[str]) -> tuple[subprocess.Popen[str], ...]:
    """Both, the one that ends first in front."""
    ended: list[subprocess.Popen[str]] = []
    event = threading.Event()

    def wait(process: subprocess.Popen[str]) -> None:
        process.wait()
        ended.append(process)
        event.set()

    for process in (one, other):
        threading.Thread(target=wait, args=(process,), daemon=True).start()
    assert event.wait(60)
    return ended[0], other if ended[0] is one else one


def test_a_dead_ray_address_is_named(model_dir: Path, port: int) -> None:
    with serving(model_dir, port, RAY_ADDRESS=f"127.0.0.1:{port}") as process:
        line = refused(process, 1)
    assert f"no Ray cluster at 127.0.0.1:{port}, which the environment variable RAY_ADDRESS names" in line
    assert "RAY_ADDRESS=local" in line


def test_an_interrupt_ends_the_wait_for_a_cluster_that_never_answers(model_dir: Path, port: int) -> None:
    # Listens on every address, since Ray takes the machine's own for 127.0.0.1.
    with closing(socket.create_server(("", 0))) as silent:
        silent.settimeout(60)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with serving(model_dir, port, RAY_ADDRESS=address) as process:
            assert process.stderr is not None
            assert f"Joining the Ray cluster at {address}" in process.stderr.readline()
            silent.accept()[0].close()  # the check of the address
            silent.accept()  # Ray's own connection, which would wait for minutes
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert "Traceback" not in process.stderr.read()


@pytest.mark.verify
def test_a_stale_file_of_ray_start_is_named(model_dir: Path, port: int, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
    with serving(model_dir, port, TMPDIR=str(tmp_path)) as process:
        assert f"which the file {tmp_path}/ray/ray_current_cluster, left by `ray start`, names" in refused(process, 1)


@pytest.mark.verify
def test_a_listener_that_is_no_ray_cluster_is_named(model_dir: Path, port: int) -> None:
    silent = socket.create_server(("", 0))
    with closing(silent), serving(model_dir, port, RAY_ADDRESS=f"127.0.0.1:{silent.getsockname()[1]}") as process:
        assert "RAY_ADDRESS names: no answer within 30 s; correct it" in refused(process, 1)


@pytest.mark.verify
def test_a_long_folder_for_temporary_files_is_left_aside(model_dir: Path, port: int, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with serving(model_dir, port, TMPDIR=str(long)) as process:
        assert process.stderr is not None
        said = ""
        while "Ready" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "TMPDIR is too long" in said
        assert f"Request log: {model_dir.parent}/divisi/serve-{port}.log\n" in said
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("applications", "keep_serve", "ended"),
    [(["divisi"], False, "all of it"), (["divisi"], True, "divisi"), (["divisi", "theirs"], False, "divisi")],
    ids=["ours alone", "a serve that was there", "with others"],
)
def test_what_others_have_on_a_cluster_stays(
    applications: list[str], keep_serve: bool, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(
        status=lambda: SimpleNamespace(applications=dict.fromkeys(applications)),
        delete=calls.append,
        shutdown=lambda: calls.append("all of it"),
    )
    monkeypatch.setattr(local_run, "serve", fake)
    local_run._take_down(keep_serve)
    assert calls == [ended]
