"""These tests run in Triton's interpreter, which a process uses for all kernels or for none: see ../test_triton.py."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*"]
else:
    from tests.support import honest_interpreter

    honest_interpreter.install()


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> None:
    """One thread: numpy does the work."""
