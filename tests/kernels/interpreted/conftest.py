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
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The interpreter sorts a block of 1,024 pairs in seconds; smaller ones go through the same lines.

    Operations are tried with the blocks of production in the full tier.
    """
    from divisi.kernels.experts import triton_place

    if "test_operations" not in request.node.nodeid or request.node.get_closest_marker("verify") is None:
        monkeypatch.setattr(triton_place, "_BLOCKS", (16, 64))


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> None:
    """One thread: numpy does the work."""
