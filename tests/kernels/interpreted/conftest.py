"""These tests run in Triton's interpreter, which a process uses for all kernels or for none: see ../test_triton.py."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*"]
else:
    from tests.support import honest_interpreter

    honest_interpreter.install()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, full_tier: bool) -> None:
    """The interpreter sorts a block of 1,024 pairs in seconds; smaller ones go through the same lines."""
    from divisi.kernels.experts import triton_place

    if not full_tier:
        monkeypatch.setattr(triton_place, "_BLOCKS", (16, 64))


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> None:
    """One thread: numpy does the work."""
