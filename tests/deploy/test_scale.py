"""What `divisi scale` waits for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from divisi.cluster.gang.membership.layout.scaling import ScaleStatus
from divisi.deploy import scale


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, ScaleStatus], list[str]]:
    """Waits for so many shards of a gang in that state; what is said."""
    monkeypatch.setattr(scale.ray, "get", lambda reply, timeout: reply)

    def wait(shards: int, status: ScaleStatus) -> list[str]:
        said: list[str] = []
        scale._wait(SimpleNamespace(scale_status=SimpleNamespace(remote=lambda: status)), shards, 60.0, said.append)
        return said

    return wait


def test_it_ends_once_they_serve(waiting: Callable[[int, ScaleStatus], list[str]]) -> None:
    assert waiting(4, ScaleStatus(4, 4)) == ["4 expert shards serve; 0.0 MB of weights read"]


def test_it_fails_once_others_are_wanted(waiting: Callable[[int, ScaleStatus], list[str]]) -> None:
    status = ScaleStatus(1, 1, why="4 of them were not there after 900 s")
    with pytest.raises(scale.ScaleFailed, match="4 are wanted no more, but 1: 4 of them were not there after 900 s"):
        waiting(4, status)
