"""`python -m divisi.kernels.native [DIR]`: compiles every variant, into the package itself where no DIR is named."""

from __future__ import annotations

import sys
from pathlib import Path

from divisi.kernels.native.build import BUILT_AHEAD, build_all

for library in build_all(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILT_AHEAD):
    print(library)
