"""Every test belongs to one part of the full tier, by one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parts import PARTS, TABLE, part_of

TESTS = Path(__file__).parent


def test_every_test_file_has_a_part() -> None:
    for path in TESTS.rglob("test_*.py"):
        assert part_of(path.relative_to(TESTS).as_posix()) in PARTS


def test_the_table_names_what_is_there() -> None:
    assert [path for path in TABLE if not (TESTS / path).exists()] == []
    assert set(TABLE.values()) == set(PARTS)


@pytest.mark.parametrize(
    ("path", "named", "part"),
    [
        ("e2e/test_shutdown.py", [], "faults"),
        ("e2e/test_overload.py", [], "serve"),
        ("cluster/engine/test_engine.py", [], "step"),
        ("cluster/engine/test_engine.py", ["faults", "step"], "faults"),
    ],
)
def test_the_nearest_says_the_part(path: str, named: list[str], part: str) -> None:
    assert part_of(path, named) == part


@pytest.mark.parametrize(
    ("path", "named", "message"),
    [("elsewhere/test_it.py", [], "no part: add its folder"), ("sim/test_it.py", ["chaos"], "'chaos'; the parts are")],
)
def test_what_has_no_part_is_told(path: str, named: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part_of(path, named)
