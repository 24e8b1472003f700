"""Runs the same `divisi serve` that a user runs, as a child process, and talks to it over HTTP."""

from __future__ import annotations

import re
import sys

import httpx

from divisi.deploy.cli.remote import RemoteError, pick_model
from divisi.deploy.demo.server import DemoFailed, free_port, running_server, wait_until_ready
from divisi.deploy.demo.talk import Talk
from divisi.model.demo import checkpoint_dir

PARTS = ("scheduler", "mixer", "router", "dispatch", "experts", "sampling", "other")
_TIME = re.compile(r'^divisi_step_seconds_total\{[^}]*part="(\w+)"[^}]*\}\s+(\S+)', re.MULTILINE)


def main() -> int:
    """Run the demo; return 0 if all went well."""
    try:
        port = free_port()
        _say("Starting divisi-demo on one attention worker and two expert shards")
        with running_server(_serve_command(port)) as (server, announced):
            seconds = wait_until_ready(server, port)
            announced.wait(5)  # lest the ready line gets into the answer
            _say(f"Ready after {seconds:.1f} s")
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as client:
                talk = Talk(client, pick_model(client, None))
                _say("A question")
                talk.ask()
                _say("A request that needs a tool")
                talk.call_a_tool()
            _show_times(port)
            _say("Stopping")
        _say("Done; no process is left")
    except (DemoFailed, RemoteError, httpx.HTTPError) as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _serve_command(port: int) -> list[str]:
    arguments = ["serve", str(checkpoint_dir()), "--port", str(port), "--expert-shards", "2", "--device", "cpu"]
    return [sys.executable, "-m", "divisi.deploy.cli", *arguments, "--kv-memory", "64MiB", "--max-seqs", "8"]


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
