"""The checkpoint that is measured: one that is given, or a random one of `configs/bench-s.json`."""

from __future__ import annotations

import json
from pathlib import Path

from divisi.model.random_checkpoint import write_random_checkpoint

_CONFIG = Path(__file__).parent / "configs" / "bench-s.json"


def bench_model(given: Path | None, scratch: Path) -> Path:
    """Its folder; a random one is made in `scratch`."""
    if given is not None:
        return given
    out = scratch / _CONFIG.stem
    write_random_checkpoint(out, json.loads(_CONFIG.read_text()))
    return out
