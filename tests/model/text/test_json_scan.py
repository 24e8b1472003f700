from __future__ import annotations

import json
from typing import Any, NoReturn

from hypothesis import given
from hypothesis import strategies as st

from divisi.model.text.json_scan import MAX_DEPTH, JsonError, JsonScanner

values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
containers = st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4)


def scanned(text: str) -> int | None:
    """Characters up to the end of the value; None where it breaks or never ends."""
    scanner = JsonScanner()
    for position, char in enumerate(text):
        try:
            scanner.push(char)
        except JsonError:
            return None
        if scanner.complete:
            return position + 1
    return None


def is_json(text: str) -> bool:
    def refuse(word: str) -> NoReturn:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@given(containers, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_takes_all_json_and_knows_its_end(value: Any, ascii_only: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert scanned(text + "}") == len(text)


@given(containers, st.data())
def test_agrees_with_json_on_damaged_text(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(at, min(len(text), at + 2)))
    damaged = text[:at] + data.draw(st.text(alphabet='{}[]",:\\ue+-.0127atrns \n\x01', max_size=3)) + text[cut:]
    end = scanned(damaged)
    if end is not None:
        assert is_json(damaged[:end])
    elif damaged.lstrip(" \n")[:1] in ('{"['):
        assert not is_json(damaged)


def test_depth_is_bounded() -> None:
    assert scanned("[" * MAX_DEPTH + "]" * MAX_DEPTH) == 2 * MAX_DEPTH
    assert scanned("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None


def test_no_bare_word_at_the_outermost_level() -> None:
    assert scanned("12 ") is None
