"""In a pod whose Ray somebody else starts: fills the folder that HAProxy is run from, before Ray begins.

usage: python -m divisi.deploy.haproxy.pod HOST PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from divisi.deploy.haproxy.config import Place
from divisi.deploy.haproxy.environment import find_binary, prepare


def main(arguments: list[str]) -> None:
    """Raises OSError and SubprocessError where HAProxy cannot be run."""
    host, port, folder = arguments
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    prepare(Place(host, int(port), folder), find_binary())


if __name__ == "__main__":
    main(sys.argv[1:])
