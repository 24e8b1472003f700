"""`divisi serve` as it is but for the worker's engine: started, waited for and stopped; and its process's own main."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from divisi.benchmarks.served.clocks import forget_clocks, read_clocks

Kind = Literal["measured", "idle"]
_READY_S, _STOP_S = 180.0, 60.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server of this machine."""

    url: str
    pid: int

    def clocks(self) -> dict[str, float]:
        """See `read_clocks`."""
        return read_clocks(self.pid)


@contextmanager
def running(kind: Kind, model_dir: Path, flags: Sequence[str], scratch: Path) -> Iterator[RunningServer]:
    """Serve a model on a free port until the context ends. Exits where the server does not become ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = scratch / f"{kind}.log"
    command = [sys.executable, "-m", __name__, kind, "serve", str(model_dir), "--port", str(port), *flags]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--log-file", str(scratch / f"{kind}-requests.log")],
            stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "RAY_ADDRESS": ""},
        )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` shall leave no server behind
    try:
        until = time.monotonic() + _READY_S
        while b"Ready" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the {kind} server did not become ready:\n{log.read_text()}")
            time.sleep(0.2)  # it has no other way to tell
        yield RunningServer(f"http://127.0.0.1:{port}", process.pid)
    finally:
        if process.poll() is None:
            forget_clocks(process.pid)
            process.send_signal(signal.SIGINT)
        process.wait(_STOP_S)
        signal.signal(signal.SIGTERM, before)


def _main() -> int:
    """The command line of `divisi`, whose driver deploys another worker."""
    from divisi.deploy.cli import main, serve

    kind = sys.argv[1]
    start = serve._serve

    def start_with_other_worker(*arguments: Any) -> int:
        from divisi.benchmarks.served.worker import IdleAttentionWorker, MeasuredAttentionWorker

        workers = {"measured": MeasuredAttentionWorker, "idle": IdleAttentionWorker}
        with patch("divisi.deploy.serve_app.AttentionWorker", workers[kind]):
            return start(*arguments)

    with patch("divisi.deploy.cli.serve._serve", start_with_other_worker):
        return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(_main())
