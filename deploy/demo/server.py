"""A server as a child process: its output shown, its start awaited, its end checked for what it leaves behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil

from divisi.deploy.settings import child_environment

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
MARK = "DIVISI_DEMO"


class DemoFailed(Exception):
    """Something did not work; the text says what."""


@contextmanager
def running_server(
    command: Sequence[str], stop_timeout_s: float = STOP_TIMEOUT_S, exit_timeout_s: float = 10.0
) -> Iterator[tuple[subprocess.Popen[str], threading.Event]]:
    """Run a server and show its output; the event says that it has printed its ready line.

    Afterwards stop it, end what it left behind, and raise DemoFailed if that was needed.

    Its processes are known by descent, and by a mark in their environment where they left the process tree.
    """
    mark = uuid.uuid4().hex
    server = subprocess.Popen(
        command, env=child_environment(**{MARK: mark}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    announced = threading.Event()
    relay = threading.Thread(target=_relay, args=(server, announced), daemon=True)
    relay.start()
    failed = True
    try:
        yield server, announced
        failed = False
    finally:
        family = _descendants(server)
        stopped = _stop(server, stop_timeout_s)
        left = _end_processes({*family, *_marked(mark)}, exit_timeout_s)
        relay.join(exit_timeout_s)
        if not failed and not stopped:
            raise DemoFailed(f"the server did not stop within {stop_timeout_s:.0f} s of SIGTERM and was killed")
        if not failed and left:
            raise DemoFailed(f"the server left processes behind, which were killed: {', '.join(left)}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_ready(server: subprocess.Popen[str], port: int) -> float:
    """Return the seconds it took. Raises DemoFailed where the server ends or takes too long."""
    begin = time.monotonic()
    while time.monotonic() - begin < READY_TIMEOUT_S:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/health/ready", timeout=5).status_code == 200:
                return time.monotonic() - begin
        except httpx.TransportError:
            pass  # not listening yet
        try:
            status = server.wait(0.25)
        except subprocess.TimeoutExpired:
            continue
        raise DemoFailed(f"the server ended with status {status} before it was ready")
    raise DemoFailed(f"the server was not ready within {READY_TIMEOUT_S:.0f} s")


def _relay(server: subprocess.Popen[str], announced: threading.Event) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        print(f"   | {line}", end="", flush=True)
        if line.startswith("Ready"):
            announced.set()


def _stop(server: subprocess.Popen[str], timeout_s: float) -> bool:
    """Ask the server to end, insist after a while; return whether asking was enough."""
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout_s)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        return False
    return True


def _end_processes(processes: set[psutil.Process], timeout_s: float) -> list[str]:
    """Wait a moment for these to end, kill those still there, return what they were."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    left = []
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            left.append(" ".join(process.cmdline())[:80])
            process.kill()
    psutil.wait_procs(alive, timeout=timeout_s)
    return left


def _descendants(server: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return list(psutil.Process(server.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _marked(mark: str) -> list[psutil.Process]:
    return [
        process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get(MARK) == mark
    ]
