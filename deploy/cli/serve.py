"""`divisi serve`: checks the settings and the checkpoint, then runs the Serve application until stopped."""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import TYPE_CHECKING

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
    http.add_argument("--served-model-name", metavar="NAME", help="default: the directory's name")
    http.add_argument("--ingress-replicas", metavar="N", help="processes that answer HTTP (default: 1)")
    http.add_argument(
        "--max-queued-requests", metavar="N",
        help="answers let in at once; above it 429 (default: what runs at once)",
    )  # fmt: skip
    http.add_argument(
        "--api-keys-file", metavar="FILE", help="who may call; make keys with `divisi keys new` (default: everybody)"
    )
    http.add_argument("--log-file", metavar="FILE", help="append a JSON line for every request (default: Ray's logs)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted, in a process of its own that the caller's watches over. Raises SettingsError."""
    # Late: `divisi --help` should not take the seconds that importing torch and Ray takes.
    from divisi.deploy.supervision import supervised

    settings = load_settings(args)
    return supervised(partial(_drive, settings), _undo, settings.limits.shutdown_grace_s)


def _drive(settings: Settings, orders: Orders) -> int:
    return exit_status(partial(_serve, settings, orders))


def _serve(settings: Settings, orders: Orders) -> int:
    """Raises KeyFileError, ConfigError, TextError and CheckpointError before anything is started."""
    from divisi.deploy.fit import fit
    from divisi.deploy.limits import KeyFile
    from divisi.model.config import ModelConfig
    from divisi.model.text import TextCodec

    config = ModelConfig.load(settings.model.model_dir)
    fit(settings, config, num_gpus=math.inf)
    from divisi.model.checkpoint import Checkpoint

    Checkpoint.open(settings.model.model_dir).check_all(config)
    TextCodec.load(settings.model.model_dir)
    if (keys := settings.auth.api_keys_file) is not None:
        KeyFile(keys)
    from divisi.deploy.local_run import serve_until_stopped

    serve_until_stopped(settings, orders)
    return 0


def _undo(address: str) -> None:
    from divisi.deploy.local_run import remove_application

    remove_application(address)
