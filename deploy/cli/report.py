"""`divisi report`: the figures of a running server, or of what Prometheus has stored of one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from divisi.deploy.cli.flags import add_connection_flags, positive

EXAMPLES = """\
examples:
  divisi report                                                      the server on port 8000, since it was started
  divisi report --html report.html --json report.json                with plots, and for machines
  divisi report --prometheus http://127.0.0.1:9090 --last 3600       an hour that `divisi monitor` has seen
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report",
        help="latencies, throughput, memory, drafts and balance",
        description="Percentiles of first token and completion by slice, tokens per second, memory, drafts that stood "
        "and the balance of experts: of a running server whose processes can be reached, or of stored metrics.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_flags(parser)
    parser.add_argument("--prometheus", metavar="URL", help="take what this Prometheus has stored")
    parser.add_argument(
        "--last", metavar="SECONDS", type=positive(int), default=900, help="with --prometheus (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with plots there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report. Raises SettingsError and SourceError."""
    from divisi.deploy.cli.remote import connection  # late: `divisi --help` should answer at once
    from divisi.deploy.monitoring.prometheus import root_of
    from divisi.deploy.report.figures import figures
    from divisi.deploy.report.sources import scrape, stored
    from divisi.deploy.report.spelling import as_page, as_text

    if args.prometheus:
        samples = stored(args.prometheus.rstrip("/"), args.last)
    else:
        way = connection(args)
        samples = scrape(root_of(way["base_url"]), way["headers"])
    report = figures(samples)
    print(as_text(report), end="")
    if args.json is not None:
        args.json.write_text(json.dumps(report.plain(), indent=2) + "\n", encoding="utf-8")
    if args.html is not None:
        args.html.write_text(as_page(report), encoding="utf-8")
    return 0
