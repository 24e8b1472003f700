"""divisi-demo: a small trained checkpoint of the Qwen3-Next architecture, and the program that trained it.

Importing this package costs nothing; its modules need torch and are used by no serving code.
"""

from __future__ import annotations

from pathlib import Path


def checkpoint_dir() -> Path:
    """The folder of the checkpoint that comes with the package."""
    return Path(__file__).with_name("divisi-demo")
