"""Entry point: picks the subcommand; `status.py` says how it ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

# Each of these adds flags with little more than argparse and imports the rest when it runs: `divisi --help` and the
# shell's completion answer at once.
from divisi.deploy.cli import bench, chat, checkpoint, completion, inspect, keys, monitor, report, scale, serve, top
from divisi.deploy.cli.status import exit_status

EXAMPLES = """\
examples:
  divisi checkpoint random --out /tmp/tiny          a small random model to try things with
  divisi inspect /tmp/tiny --expert-shards 2        what each rank would load
  divisi serve /tmp/tiny                            serve it, all in one process
  divisi serve /tmp/tiny --expert-shards 2          one attention worker and two expert shards
  divisi chat                                       talk to it from another terminal
  divisi bench --concurrency 8 --requests 100       measure it
  divisi top                                        who sits where and does what, live
  divisi scale --expert-shards 3                    another shard, while it serves
  divisi report                                     what it has seen: percentiles, memory, drafts, balance
  source <(divisi completion bash)                  complete commands and flags with TAB

Each command has its own --help.
"""


class _ShowVersion(argparse.Action):
    """Prints the version; looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"divisi {version('divisi')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands; `run` in the parsed namespace carries the command out."""
    parser = argparse.ArgumentParser(
        prog="divisi",
        description="Serve Qwen3-Next models: attention workers hold the conversation, expert shards hold the weights.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (serve, chat, bench, top, scale, report, monitor, inspect, checkpoint, keys, completion):
        command.add_parser(commands)
    parser.set_defaults(root=parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status: 0, 1 when it failed, 2 for a user's mistake, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    return exit_status(lambda: args.run(args))
