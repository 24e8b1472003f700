"""`divisi monitor`: a Prometheus beside a running server, with the alerts, in the foreground."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from divisi.deploy.cli.flags import add_connection_flags, positive

EXAMPLES = """\
examples:
  divisi monitor                                         watch the server on port 8000; Prometheus is on port 9090
  divisi monitor --base-url http://10.0.0.5:8000/v1      one elsewhere; the ports of its processes must be reachable
  divisi report --prometheus http://127.0.0.1:9090       what it has seen

Dashboards for Grafana: k8s/monitoring/dashboards/*.json.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "monitor",
        help="run Prometheus beside a server",
        description="Run Prometheus, which has to be installed, with Divisi's alerts, on all processes of a server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_flags(parser)
    parser.add_argument(
        "--listen", metavar="ADDRESS:PORT", default="127.0.0.1:9090", help="of Prometheus (default: %(default)s)"
    )
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="for what it stores (default: ~/.local/state/divisi/prometheus)"
    )
    parser.add_argument(
        "--every", metavar="SECONDS", type=positive(int), default=5, help="between scrapes (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become Prometheus. Raises SettingsError and NoPrometheus."""
    from divisi.deploy.cli.remote import connection, read_key  # late: `divisi --help` should answer at once
    from divisi.deploy.monitoring.prometheus import prepare, root_of
    from divisi.deploy.settings import Surroundings

    server = root_of(connection(args)["base_url"])
    folder = args.data or Surroundings.read().state_home / "divisi" / "prometheus"
    command = prepare(folder.absolute(), server, args.listen, read_key(args.api_key), args.every)
    print(f"Prometheus on http://{args.listen} scrapes {server}; its data are in {folder}; Ctrl-C ends it", flush=True)
    os.execv(command[0], command)
