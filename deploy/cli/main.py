"""Entry point: picks the subcommand and turns a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from divisi.cluster.errors import DivisiError
from divisi.deploy.cli import checkpoint, inspect, serve
from divisi.deploy.settings import SettingsError
from divisi.model.errors import CheckpointError, ConfigError
from divisi.model.text import TextError

EXAMPLES = """\
examples:
  divisi checkpoint random --out /tmp/tiny          a small random model to try things with
  divisi inspect /tmp/tiny --expert-shards 2        what each rank would load
  divisi serve /tmp/tiny                            serve it, all in one process
  divisi serve /tmp/tiny --expert-shards 2          one attention worker and two expert shards

Each command has its own --help.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands; `run` in the parsed namespace carries the command out."""
    parser = argparse.ArgumentParser(
        prog="divisi",
        description="Serve Qwen3-Next models: attention workers hold the conversation, expert shards hold the weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"divisi {version('divisi')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, inspect, checkpoint):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status: 0, 1 when it failed, 2 for a user's mistake, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (SettingsError, ConfigError, CheckpointError, TextError) as error:
        print(f"divisi: error: {error}", file=sys.stderr)
        return 2
    except DivisiError as error:
        print(f"divisi: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
