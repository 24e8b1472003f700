from __future__ import annotations

import pytest

from divisi.model.text.grammar.regex_size import written_out_size


@pytest.mark.parametrize(
    ("expression", "size"),
    [
        ("", 0),
        ("abc", 3),
        (r"\d{4}-\d{2}", 7),
        ("a{3,}", 3),
        ("a{,5}", 5),
        ("(ab){10}c", 21),
        ("((a{1,100}){1,100}){1,100}", 10**6),
        ("(a|b){1,100000}", 300_000),
        ("[{2}]{7}", 7),
        (r"[^\]x]{3}", 3),
        ("a{x}", 4),
        (r"\{2}", 3),
        ("a{" + "9" * 1000 + "}", 999_999_999),
        ("((((", 0),
        ("))))", 4),
    ],
)
def test_size(expression: str, size: int) -> None:
    assert written_out_size(expression) == size
