"""The schema of the values: not stale, closed, and its messages name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.k8s.helm import CHART, PRESETS, ROOT, Values, at, helm, merged, preset, refusal

OPEN = ("extraObjects", "global")
"""Objects of others."""


def full_values() -> Values:
    """Values with something in each place, so that every key can be misspelled."""
    values: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    everything: Values = yaml.safe_load((ROOT / "tests" / "k8s" / "everything.yaml").read_text(encoding="utf-8"))
    return merged(values, everything)


def places(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every mapping, list and leaf, with the way to it."""
    yield path, values
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*path, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from places(value, (*path, index))


def schema_of(path: tuple[str | int, ...], schema: dict[str, Any]) -> dict[str, Any]:
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


def changed(values: Values, path: tuple[str | int, ...], change: Any) -> Values:
    """A copy in which `change` was called with what holds the last step, and that step."""
    copy = json.loads(json.dumps(values))
    holder = copy
    for step in path[:-1]:
        holder = holder[step]
    change(holder, path[-1])
    return copy


SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
PLACES = [
    (path, value)
    for path, value in places(full_values())
    if path and path[0] not in OPEN
]  # fmt: skip
KEYS = [
    path
    for path, _ in PLACES
    if isinstance(path[-1], str) and schema_of(path[:-1], SCHEMA).get("additionalProperties") is False
]
LEAVES = [(path, value) for path, value in PLACES if not isinstance(value, dict | list)]


def pointer(path: tuple[str | int, ...]) -> str:
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
    assert refusal(full_values()) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_taken_and_lint_is_content(name: str) -> None:
    assert refusal(preset(name)) == ""
    report = helm().lint(str(CHART), preset(name), strict=True)
    assert [message for message in report["messages"] if message["severity"] not in ("INFO", 1)] == []


def test_every_misspelled_key_is_named() -> None:
    """Each key, in its place, by a letter more."""
    helm()
    wrong = []
    for path in KEYS:
        bad = f"{path[-1]}x"

        def misspell(holder: Any, key: Any, bad: str = bad) -> None:
            holder[bad] = holder.pop(key)

        said = refusal(changed(full_values(), path, misspell))
        if f"additional properties '{bad}' not allowed" not in said or (
            len(path) > 1 and f"'{pointer(path[:-1])}'" not in said
        ):
            wrong.append(f"{pointer(path)}: {said or 'taken'}")
    assert not wrong, "\n".join(wrong[:20])


def test_every_leaf_of_a_wrong_type_is_named() -> None:
    """Text for a number, a truth value for text, a list for either."""
    helm()
    wrong = []
    for path, value in LEAVES:
        for bad in ([], "no such thing" if isinstance(value, bool | int | float) and value is not None else True):
            if isinstance(bad, str) and value is None:
                continue

            def replace(holder: Any, key: Any, bad: Any = bad) -> None:
                holder[key] = bad

            said = refusal(changed(full_values(), path, replace))
            if f"'{pointer(path)}'" not in said:
                wrong.append(f"{pointer(path)} = {bad!r}: {said or 'taken'}")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize(
    "path", ["divisi.http.host", "divisi.http.port", "divisi.http.haproxy", "divisi.placement", "divisi.gang.pin_cores",
             "divisi.gang.secret_file", "divisi.gang.tls", "divisi.auth.api_keys_file", "divisi.log.file"],
)  # fmt: skip
def test_what_the_chart_decides_is_refused(path: str) -> None:
    said = refusal(at(path, "x"))
    assert f"additional properties '{path.rpartition('.')[2]}' not allowed" in said


def test_auto_is_no_device() -> None:
    assert "/divisi/gang/device" in refusal(at("divisi.gang.device", "auto"))
