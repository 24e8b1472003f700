"""`divisi serve`: checks the settings and the checkpoint, then runs the Serve application until stopped."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import TYPE_CHECKING

from divisi.deploy.cli.check import check_deployment
from divisi.deploy.cli.flags import add_deployment_flags, load_settings
from divisi.deploy.cli.status import exit_status

if TYPE_CHECKING:
    from divisi.deploy.settings import Settings
    from divisi.deploy.supervision import Orders

EXAMPLES = """\
examples:
  divisi serve                                                   the demo model, in one process
  divisi serve /models/tiny                                      one process
  divisi serve /models/tiny --expert-shards 2                    one attention worker, two expert shards
  divisi serve /models/next --attention-workers 2 --expert-shards 4 --device cuda --kv-memory 16GiB
  divisi serve /models/next --topology colocated --attention-workers 4    four ranks, each with a quarter of the experts
  divisi serve --config divisi.toml --port 9000                  flags win over the file
  RAY_ADDRESS=10.0.0.1:6379 divisi serve --replace               in place of the one on that Ray cluster

then:
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}'

Stop it with Ctrl-C; it takes all of its processes with it.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description="Serve a model directory over the OpenAI API, on this machine or on the Ray cluster it belongs to.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_deployment_flags(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    http.add_argument("--port", metavar="N", help="default: 8000")
    http.add_argument(
        "--served-model-name", metavar="NAME[,ALIAS...]",
        help="what requests call the model; replies have the first (default: the directory's name)",
    )  # fmt: skip
    http.add_argument(
        "--allowed-origins", metavar="ORIGIN[,...]",
        help="web pages whose scripts may call, as in https://chat.example.org, or * for all (default: none)",
    )  # fmt: skip
    http.add_argument("--ingress-replicas", metavar="N", help="processes that answer HTTP (default: 1)")
    http.add_argument(
        "--haproxy", action=argparse.BooleanOptionalAction,
        help="HAProxy in front of them, where Ray is started here; else Ray Serve's Python proxy (default: on)",
    )  # fmt: skip
    http.add_argument(
        "--max-queued-requests", metavar="N",
        help="answers let in at once; above it 429 (default: what runs at once)",
    )  # fmt: skip
    http.add_argument(
        "--api-keys-file", metavar="FILE", help="who may call; make keys with `divisi keys new` (default: everybody)"
    )
    http.add_argument(
        "--log-file", metavar="FILE",
        help="append a JSON line for every request (default: serve-PORT.log in ~/.local/state/divisi)",
    )  # fmt: skip
    telemetry = parser.add_argument_group("telemetry")
    telemetry.add_argument(
        "--otlp-traces-endpoint", metavar="URL",
        help="trace requests and some steps, to a collector as in http://127.0.0.1:4318 (default: no traces)",
    )  # fmt: skip
    telemetry.add_argument(
        "--otlp-metrics-endpoint", metavar="URL",
        help="send metrics there too (default: they can be scraped, see /metrics/targets)",
    )  # fmt: skip
    parser.add_argument(
        "--replace", action="store_true",
        help="on a Ray cluster where Divisi already runs: take its place (default: refuse)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted, in a process of its own that the caller's watches over. Raises SettingsError."""
    from divisi.deploy.supervision import supervised  # late: `divisi --help` should answer at once

    settings = load_settings(args)
    return supervised(partial(_drive, settings, args.replace), _undo, settings.limits.shutdown_grace_s)


def _drive(settings: Settings, replace: bool, orders: Orders) -> int:
    return exit_status(partial(_serve, settings, replace, orders))


def _serve(settings: Settings, replace: bool, orders: Orders) -> int:
    """Raises what `check_deployment` and `serve_until_stopped` raise."""
    from divisi.deploy.cli.card import own_gpu_memory  # late, as torch is

    checked = check_deployment(settings, math.inf, own_gpu_memory(settings))
    from divisi.deploy.local_run import serve_until_stopped  # late: it takes seconds to import Ray

    serve_until_stopped(checked.settings, orders, replace=replace)
    return 0


def _undo(address: str, keep_serve: bool) -> None:
    from divisi.deploy.local_run import remove_application

    remove_application(address, keep_serve)
