"""What `make test` runs in two processes keeps together what must not run side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.side_by_side import LONG, SERVERS, Groups, group_of, servers_first

TESTS = Path(__file__).parent


def test_the_lists_name_what_is_there() -> None:
    assert [path for path in (*SERVERS, *LONG) if not (TESTS / path).exists()] == []


def test_every_file_that_starts_a_server_is_in_their_group() -> None:
    starts = ("running_cluster", "ray.init", "tests.support.haproxy_manager")
    for path in TESTS.rglob("test_*.py"):
        name = path.relative_to(TESTS).as_posix()
        text = path.read_text(encoding="utf-8")
        if path != Path(__file__) and not name.startswith("clients/") and any(word in text for word in starts):
            assert group_of(name) == "servers", f"tests/{name} starts a server: add it to tests/side_by_side.py"


@pytest.mark.parametrize(
    ("path", "group", "place"),
    [
        ("e2e/test_front.py", "servers", 0),
        ("deploy/test_demo.py", "servers", 0),
        ("kernels/test_triton.py", "kernels/test_triton.py", 1),
        ("cluster/engine/test_engine.py", "cluster/engine/test_engine.py", 2),
        ("e2e_like/test_it.py", "e2e_like/test_it.py", 2),
    ],
)
def test_servers_come_first_and_the_rest_goes_by_file(path: str, group: str, place: int) -> None:
    assert (group_of(path), servers_first(path)) == (group, place)


def test_the_scheduler_goes_by_the_groups() -> None:
    names = ("tests/e2e/test_front.py::test_it[a::b]", "tests/deploy/haproxy/test_http.py::test_it", "tests/a/b.py::t")
    assert [Groups._split_scope(None, name) for name in names] == ["servers", "servers", "a/b.py"]  # type: ignore[arg-type]
