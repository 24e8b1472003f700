from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest


@pytest.fixture
def port() -> Iterator[int]:
    """A free port, which nobody else is given while the test runs."""
    with closing(socket.socket()) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
