"""Before a node of the cluster ends: what it runs goes elsewhere, and its open answers have their time.

usage: python -m divisi.deploy.leave_node [--within SECONDS] [--node ID]

Run on the node itself, before its `ray start --block` gets SIGTERM, after which Ray waits 30 s at most; for instance
as a pod's preStop hook.
"""

from __future__ import annotations

import argparse
import logging
import sys

import ray

from divisi.cluster.ray.leaving import leave


def main(arguments: list[str]) -> int:
    """Exit status 0 once nothing of Serve's is on the node, 1 with a line on standard error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m divisi.deploy.leave_node")
    parser.add_argument("--within", type=float, default=25.0, metavar="SECONDS")
    parser.add_argument("--node", metavar="ID", help="Ray's name of the node; by default this one")
    args = parser.parse_args(arguments)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        node = args.node or ray.get_runtime_context().get_node_id()
        if leave(node, args.within):
            return 0
        problem = f"replicas were still on the node after {args.within:g} s"
    except (RuntimeError, ConnectionError) as error:
        problem = str(error)
    print(f"error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
