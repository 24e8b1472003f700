"""`make demo`: a split cluster on this machine, one question over HTTP, the streamed answer, where the time went.

Runs the same `divisi serve` that a user runs, as a child process, and afterwards checks that it left nothing behind.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from divisi.deploy.settings import child_environment

QUESTION = "What does an orchestra do when a section divides?"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
MARK = "DIVISI_DEMO"
PARTS = ("scheduler", "mixer", "router", "dispatch", "experts", "sampling", "other")
_TIME = re.compile(r'^divisi_step_seconds_total\{[^}]*part="(\w+)"[^}]*\}\s+(\S+)', re.MULTILINE)


class DemoFailed(Exception):
    """Something did not work; the text says what."""


def main() -> int:
    """Run the demo; return 0 if all went well."""
    try:
        with tempfile.TemporaryDirectory(prefix="divisi-demo-") as folder:
            model_dir = Path(folder) / "tiny"
            _say("Writing a random checkpoint (its answers are noise; everything else is real)")
            _write_checkpoint(model_dir)
            port = _free_port()
            _say("Starting one attention worker and two expert shards")
            with running_server(_serve_command(model_dir, port)) as (server, announced):
                seconds = _wait_until_ready(server, port)
                announced.wait(5)  # lest the ready line gets into the answer
                _say(f"Ready after {seconds:.1f} s")
                _ask(port)
                _show_times(port)
                _say("Stopping")
        _say("Done; no process is left")
    except (DemoFailed, httpx.HTTPError) as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


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


def _serve_command(model_dir: Path, port: int) -> list[str]:
    arguments = ["serve", str(model_dir), "--port", str(port), "--expert-shards", "2", "--device", "cpu"]
    return [sys.executable, "-m", "divisi.deploy.cli", *arguments, "--kv-memory", "64MiB", "--max-seqs", "8"]


def _write_checkpoint(out: Path) -> None:
    command = [sys.executable, "-m", "divisi.deploy.cli", "checkpoint", "random", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise DemoFailed(f"{' '.join(command[2:])} ended with status {done.returncode}")
    # The next line says how to serve it, which the demo does itself.
    print(f"   | {done.stdout.splitlines()[0]}", flush=True)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[str], port: int) -> float:
    """The seconds it took."""
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


def _ask(port: int) -> None:
    base = f"http://127.0.0.1:{port}/v1"
    with httpx.Client(timeout=httpx.Timeout(60)) as client:
        model = client.get(f"{base}/models").raise_for_status().json()["data"][0]["id"]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 48,
            "temperature": 0.7,
            "seed": 4,
            "stream": True,
        }
        _say(f"Question: {QUESTION}")
        print("Answer:   ", end="", flush=True)
        begin, pieces, finish = time.monotonic(), 0, None
        with client.stream("POST", f"{base}/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text = choice["delta"].get("content") or ""
                    pieces += bool(text)
                    finish = choice.get("finish_reason") or finish
                    print(text.replace("\n", " "), end="", flush=True)
        print()
    if finish not in ("stop", "length"):
        raise DemoFailed(f"the answer ended with finish_reason {finish!r}")
    _say(f"{pieces} pieces in {time.monotonic() - begin:.2f} s, finish_reason {finish}")


def _show_times(port: int) -> None:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).raise_for_status().text
    seconds = dict.fromkeys(PARTS, 0.0)
    for part, value in _TIME.findall(text):
        seconds[part] = seconds.get(part, 0.0) + float(value)
    total = sum(seconds.values())
    if not total:
        raise DemoFailed("/metrics has no divisi_step_seconds_total")
    _say("Where the time of the steps went:")
    for part, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {part:<10} {value * 1e3:9.1f} ms  {value / total:6.1%}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
