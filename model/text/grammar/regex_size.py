"""How large a regular expression is once its counted repetitions are written out."""

from __future__ import annotations

import re

_COUNTED = re.compile(r"\{(\d*)(?:(,)(\d*))?\}")


def written_out_size(expression: str) -> int:
    """Atoms of an expression with each `x{m,n}` counted n times (m times without an n); nested ones multiply.

    A rough reading, exact for what makes expressions large; it never fails on one that is malformed.
    """
    totals = [0]  # of each group that is open
    last = 0  # of the atom or group that a repetition would apply to
    place = 0
    while place < len(expression):
        char = expression[place]
        if char == "(":
            totals.append(0)
            last, place = 0, place + 1
        elif char == ")" and len(totals) > 1:
            last, place = totals.pop(), place + 1
            totals[-1] += last
        elif char == "{" and (counted := _COUNTED.match(expression, place)):
            totals[-1] += last * (_times(counted) - 1)
            last *= _times(counted)
            place = counted.end()
        else:
            place = _skip_atom(expression, place)
            last = 1
            totals[-1] += 1
    return sum(totals)


def _times(counted: re.Match[str]) -> int:
    """How often at most, where there is a bound; else how often at least."""
    # Numbers of more digits are hopeless, and reading them costs time.
    low, high = (int(text[:9]) if text else 0 for text in (counted[1], counted[3]))
    return max(high or low, 1)


def _skip_atom(expression: str, place: int) -> int:
    if expression[place] == "\\":
        return place + 2
    if expression[place] != "[":
        return place + 1
    end = place + 2  # a bracket right after the opening one is part of the class
    while end < len(expression) and expression[end] != "]":
        end += 2 if expression[end] == "\\" else 1
    return end + 1
