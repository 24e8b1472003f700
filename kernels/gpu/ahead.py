"""Where Triton kernels that were compiled ahead lie. Imports no triton."""

from __future__ import annotations

from pathlib import Path

BUILT_AHEAD = Path(__file__).parent / "built"
"""In Triton's own layout, by `python -m divisi.benchmarks.gpu.ahead`. No GPU has run what is taken from there."""


def is_built() -> bool:
    """Whether this installation brings them along."""
    return BUILT_AHEAD.is_dir()
