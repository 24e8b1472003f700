"""Descendants are found wherever they have gone, and nobody else's processes are touched."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil

from divisi.deploy.supervision.orphans import socket_files

# A daemon as in the books: its parent is gone, and it leads a session of its own.
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    os._exit(0)
os.wait()
"""
SCRIPT = f"""
import subprocess, sys, psutil
from divisi.deploy.supervision.orphans import adopt_orphans, descendants, end_descendants
adopt_orphans()
spared = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
strangers = psutil.Process().children()
made = subprocess.Popen([sys.executable, "-c", {DAEMON!r}], stdout=subprocess.PIPE, text=True)
daemon = int(made.stdout.readline())
made.wait()
found = [process.pid for process in descendants(strangers)]
assert found == [daemon], (found, daemon)
assert end_descendants(5.0, strangers) == []
assert not psutil.pid_exists(daemon)
assert spared.poll() is None
spared.kill()
spared.wait()
"""
# Each process starts its successor as soon as it can, until a moment after which none is left.
BREEDER = """
import subprocess, sys, time
code, last = sys.argv[1:]
while time.monotonic() < float(last):
    subprocess.Popen([sys.executable, "-S", "-c", code, code, last], start_new_session=True).wait(0.3)
"""
BREEDERS = f"""
import subprocess, sys, time
from divisi.deploy.supervision.orphans import adopt_orphans, descendants, end_descendants
adopt_orphans()
code, last = {BREEDER!r}, str(time.monotonic() + 30)
subprocess.Popen([sys.executable, "-S", "-c", code, code, last])
while len(descendants()) < 4:
    time.sleep(0.02)
assert end_descendants(10.0) == []
assert descendants() == []
"""


LISTENER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[2])
print(flush=True)
sys.stdin.read()
"""


def test_the_socket_files_are_those_that_a_process_listens_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        command = [sys.executable, "-c", LISTENER, str(tmp_path / "own"), str(tmp_path / "other")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert socket_files([psutil.Process(process.pid)]) == {tmp_path / "own"}


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_daemon_is_found_and_ended_and_a_stranger_spared() -> None:
    run(SCRIPT)


def test_what_is_started_meanwhile_is_ended_too() -> None:
    run(BREEDERS)
