"""`divisi scale`: another number of expert shards for a running server, while it serves."""

from __future__ import annotations

import argparse

from divisi.deploy.cli.flags import positive

EXAMPLES = """\
examples:
  divisi scale --expert-shards 3                            the one server of this machine
  divisi scale --expert-shards 3 --ray-address 10.0.0.5:6379    that of another cluster, from one of its nodes

Each new shard loads the share that it lacks while the others serve; then one epoch has them all. Answers go on, and
are the same. Without Ray at hand: POST /v1/admin/gang, with a key that is marked admin.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "scale",
        help="more or fewer expert shards, while it serves",
        description="Give a running server another number of expert shards, and wait until they serve.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--expert-shards", metavar="N", type=positive(int), required=True, help="as many are to serve")
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT",
        help="of the Ray cluster (default: RAY_ADDRESS, that of `ray start`, or the one Ray of this machine)",
    )  # fmt: skip
    parser.add_argument(
        "--application", metavar="NAME", default="divisi", help="the server's among Ray Serve's (default: divisi)"
    )
    parser.add_argument(
        "--within", metavar="SECONDS", type=positive(float), default=300.0, help="give up waiting (default: 300)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask and wait. Raises SettingsError and ScaleFailed."""
    from divisi.deploy.scale import scale  # late: `divisi --help` should not pay for its imports

    scale(args.expert_shards, args.application, args.ray_address, args.within, lambda line: print(line, flush=True))
    return 0
