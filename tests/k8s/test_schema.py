"""The schema of the values: not stale, closed, and its messages name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.helm import CHART, PRESETS, ROOT, Values, at, helm, merged, preset, refusal, schema_refusal

OPEN = ("extraObjects", "global")
"""Objects of others."""


Path = tuple[str | int, ...]
"""To a place in the values."""


def full_values() -> Values:
    """Values with something in each place, so that every key can be misspelled."""
    values: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    everything: Values = yaml.safe_load((ROOT / "tests" / "k8s" / "everything.yaml").read_text(encoding="utf-8"))
    return merged(values, everything)


def places(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every mapping, list and leaf, with the way to it."""
    yield path, values
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*path, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from places(value, (*path, index))


def schema_of(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """The part of the values' schema for a place."""
    root, here = schema, schema
    for step in path:
        here = (
            here["items"]
            if isinstance(step, int)
            else here.get("properties", {}).get(step, here.get("additionalProperties"))
        )
        if "$ref" in here:
            here = root["$defs"][here["$ref"].rpartition("/")[2]]
    return here


def changed(values: Values, path: Path, change: Any) -> Values:
    """A copy in which `change` was called with what holds the last step, and that step."""
    copy = json.loads(json.dumps(values))
    holder = copy
    for step in path[:-1]:
        holder = holder[step]
    change(holder, path[-1])
    return copy


SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
VALUES = full_values()
PLACES = [
    (path, value)
    for path, value in places(VALUES)
    if path and path[0] not in OPEN
]  # fmt: skip
KEYS = [
    path
    for path, _ in PLACES
    if isinstance(path[-1], str) and schema_of(path[:-1], SCHEMA).get("additionalProperties") is False
]
LEAVES = [(path, value) for path, value in PLACES if not isinstance(value, dict | list)]


def pointer(path: Path) -> str:
    return "/" + "/".join(str(step).replace("~", "~0").replace("/", "~1") for step in path)


def test_it_is_not_stale() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "k8s" / "make_schema.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_tried_is_everything() -> None:
    """Each key that the schema knows is somewhere in the values that are tried."""
    tried = {tuple(step for step in path if isinstance(step, str)) for path in KEYS}

    def known(schema: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, field in schema.get("properties", {}).items():
            yield (*path, name)
            if "$ref" not in field:
                yield from known(field.get("items", field), (*path, name))

    assert [path for path in known(SCHEMA, ()) if path not in tried and path[0] not in OPEN] == []
    assert len(KEYS) > 300
    assert len(LEAVES) > 250
    shared = {name: set(known(schema.get("items", schema), ())) for name, schema in SCHEMA["$defs"].items()}
    endings = {path[-length:] for path in tried for length in range(1, len(path))}
    assert {name: sorted(keys - endings) for name, keys in shared.items() if keys - endings} == {}


def test_the_values_that_are_tried_are_taken() -> None:
    assert refusal(VALUES) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_taken_and_lint_is_content(name: str) -> None:
    assert refusal(preset(name)) == ""
    report = helm().lint(str(CHART), preset(name), strict=True)
    assert [message for message in report["messages"] if message["severity"] not in ("INFO", 1)] == []


def misspell(holder: Any, key: Any) -> None:
    holder[f"{key}x"] = holder.pop(key)


def tells_the_key(said: str, path: Path) -> bool:
    lines = [line for line in said.splitlines() if f"'{pointer(path[:-1]) if len(path) > 1 else ''}'" in line]
    return any("additional properties" in line and f"'{path[-1]}x'" in line for line in lines)


def replacing(bad: Any) -> Callable[[Any, Any], None]:
    def replace(holder: Any, key: Any) -> None:
        holder[key] = bad

    return replace


def wrong_types(value: Any) -> list[Any]:
    """A list for anything; text for a number, a truth value for text."""
    if value is None:
        return [[]]
    return [[], "no such thing" if isinstance(value, bool | int | float) else True]


def test_misspelled_keys_are_named_all_at_once() -> None:
    """All of a depth in one go: Helm names each."""
    missed = []
    for depth in sorted({len(path) for path in KEYS}):
        values, at_depth = VALUES, [path for path in KEYS if len(path) == depth]
        for path in at_depth:
            values = changed(values, path, misspell)
        said = schema_refusal(values)
        missed += [pointer(path) for path in at_depth if not tells_the_key(said, path)]
    assert missed == []


@pytest.mark.parametrize("round_of", [0, 1])
def test_leaves_of_a_wrong_type_are_named_all_at_once(round_of: int) -> None:
    values, tried = VALUES, [(path, wrong_types(value)[round_of:]) for path, value in LEAVES]
    for path, bad in tried:
        if bad:
            values = changed(values, path, replacing(bad[0]))
    said = schema_refusal(values)
    assert [pointer(path) for path, bad in tried if bad and f"'{pointer(path)}'" not in said] == []


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_each_misspelled_key_alone_is_named(record_result: Callable[[str, object], None]) -> None:
    missed = [
        pointer(path) for path in KEYS if not tells_the_key(schema_refusal(changed(VALUES, path, misspell)), path)
    ]
    record_result("keys", len(KEYS))
    assert missed == []


@pytest.mark.verify
@pytest.mark.timeout(600)
def test_each_leaf_of_a_wrong_type_alone_is_named(record_result: Callable[[str, object], None]) -> None:
    tried = [(path, bad) for path, value in LEAVES for bad in wrong_types(value)]
    record_result("leaves and types", len(tried))
    refusals = [(path, bad, schema_refusal(changed(VALUES, path, replacing(bad)))) for path, bad in tried]
    assert [(pointer(path), bad) for path, bad, said in refusals if f"'{pointer(path)}'" not in said] == []


@pytest.mark.parametrize(
    "path", ["divisi.http.host", "divisi.http.port", "divisi.http.haproxy", "divisi.placement", "divisi.gang.pin_cores",
             "divisi.gang.secret_file", "divisi.gang.tls", "divisi.auth.api_keys_file", "divisi.log.file"],
)  # fmt: skip
def test_what_the_chart_decides_is_refused(path: str) -> None:
    said = refusal(at(path, "x"))
    assert f"additional properties '{path.rpartition('.')[2]}' not allowed" in said


def test_auto_is_no_device() -> None:
    assert "/divisi/gang/device" in refusal(at("divisi.gang.device", "auto"))
