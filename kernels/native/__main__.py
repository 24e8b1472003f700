"""`python -m divisi.kernels.native [DIR]`: compiles every variant, into the package itself where no DIR is named."""

from __future__ import annotations

import argparse
from pathlib import Path

from divisi.kernels.native.build import BUILT_AHEAD, build_all

parser = argparse.ArgumentParser(prog="python -m divisi.kernels.native", description="Compile every variant.")
parser.add_argument("directory", nargs="?", type=Path, default=BUILT_AHEAD, help="default: within the package")
for library in build_all(parser.parse_args().directory):
    print(library)
