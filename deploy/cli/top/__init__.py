"""`divisi top`: the seats of a running server, its epochs, queues and load, live in a terminal."""

from __future__ import annotations

import argparse

from divisi.deploy.cli.flags import add_connection_flags, positive

EXAMPLES = """\
examples:
  divisi top                                           the server on port 8000, once a second until Ctrl-C
  divisi top --once                                    one table, for scripts; so it is where the output is no terminal
  divisi top --base-url http://10.0.0.5:8000/v1

how to read it:
  queued tokens         of prompts that are still to be computed
  refused tokens        of requests that found no room (429) and may come again; autoscaling counts both
  Rates are those since the last table, requests those of the ingress replica that has answered. Prometheus has the
  rest: divisi monitor.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "top",
        help="seats, epochs, queues and load, live",
        description="Show who sits in which seat of a running server, and what each of them does, until Ctrl-C.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_flags(parser)
    parser.add_argument(
        "--every", metavar="SECONDS", type=positive(float), default=1.0, help="between tables (default: 1)"
    )
    parser.add_argument("--once", action="store_true", help="one table, after one such time")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show tables until Ctrl-C. Raises SettingsError, and RemoteError where the first ones cannot be had."""
    from divisi.deploy.cli.top.command import top  # late: `divisi --help` should not pay for its imports

    return top(args)
