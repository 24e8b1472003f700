"""`divisi serve` in the foreground: a curl line that can be pasted, and failures to start in one line."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from divisi.deploy.local_run import _ready_text
from divisi.deploy.settings import Settings
from divisi.model.random_checkpoint import write_random_checkpoint

SECOND = """
import ray
from divisi.deploy.local_run import _ray
with _ray(1) as own:
    assert own, "joined the instance of another divisi serve"
    print(len(ray.nodes()))
"""
FIRST = f"""
import subprocess, sys
from divisi.deploy.local_run import _ray
with _ray(1) as own:
    assert own
    subprocess.run([sys.executable, "-c", {SECOND!r}], check=True)
"""


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
    subprocess.run([sys.executable, "-c", FIRST], check=True, timeout=120)


@pytest.mark.parametrize("taken", [True, False], ids=["port taken", "no such device"])
def test_what_cannot_be_started_ends_in_one_line(tmp_path: Path, taken: bool) -> None:
    write_random_checkpoint(tmp_path / "tiny", None, 0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        # more GPUs than any machine has
        flags = [] if taken else ["--device", "cuda", "--attention-workers", "60", "--expert-shards", "4"]
        flags += ["--port", port]
        command = [sys.executable, "-m", "divisi.deploy.cli", "serve", str(tmp_path / "tiny"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in lines[-1] if taken else "64 in all" in lines[-1]
