"""What a rank imports as it starts is kept from the collector of garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from divisi.cluster.newcomer import made_to_last


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """As for the other tests."""
    yield
    gc.unfreeze()


def test_no_collection_looks_at_what_was_made() -> None:
    with made_to_last():
        assert not gc.isenabled(), "it would look at it again and again meanwhile"
        made: list[list[int]] = [[]]
    assert gc.isenabled()
    later: list[list[int]] = [[]]
    looked_at = gc.get_objects()
    assert all(each is not made for each in looked_at)
    assert any(each is later for each in looked_at)


def test_what_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), made_to_last():
        raise ImportError("no such module")
    assert gc.isenabled()
