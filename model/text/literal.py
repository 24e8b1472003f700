"""Text that a chat template handles like any other, though its letters can be told from the template's own.

Each letter that an added token has is replaced by a mark, a character of its own that the conversation doesn't use.
Marks survive what templates do with text, and an added token that has none is the template's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from divisi.model.text.errors import TemplateError

MARKS = range(0x40000, 0xE0000)
"""Planes without any character: normalisation, case and blanks leave them as they are."""


class Marks:
    """Marks for some letters, one character for one, so that positions and lengths stay."""

    def __init__(self, letters: Iterable[str], used: Iterable[str]) -> None:
        """`used`: characters that are no marks. Raises TemplateError where these are nearly all that there are."""
        taken = set(used)
        free = (mark for mark in map(chr, MARKS) if mark not in taken)
        pairs = list(zip(free, ordered := sorted(set(letters)), strict=False))
        if len(pairs) < len(ordered):
            raise TemplateError("the conversation uses too many different characters; send it in parts")
        self._marks = {ord(letter): mark for mark, letter in pairs}
        self._letters = {ord(mark): letter for mark, letter in pairs}

    def mark(self, value: Any) -> Any:
        """A value whose strings, keys too and however deep, are literal."""
        if isinstance(value, str):
            return Literal(value.translate(self._marks), value, self)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def unmark(self, text: str) -> str:
        """Text with its letters back."""
        return text.plain if isinstance(text, Literal) else text.translate(self._letters)


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, Literal) else value


def _asks(name: str) -> Callable[..., Any]:
    """A method with an answer that is no text."""

    def ask(text: Literal, *args: Any) -> Any:
        given = [tuple(map(_plain, arg)) if isinstance(arg, tuple) else _plain(arg) for arg in args]
        return getattr(text.plain, name)(*given)

    return ask


def _strips(name: str) -> Callable[..., Any]:
    """A method that takes something from the ends."""

    def strip(text: Literal, *args: Any) -> str:
        left = getattr(text.plain, name)(*map(_plain, args))
        start = len(text) - len(left) if name in ("lstrip", "removeprefix") else 0
        if name == "strip":
            start = len(text) - len(text.plain.lstrip(*map(_plain, args)))
        return text[start : start + len(left)]

    return strip


def _splits(name: str) -> Callable[..., Any]:
    """A method whose answer is pieces, in order."""

    def split(text: Literal, *args: Any, **options: Any) -> Any:
        given = [_plain(arg) for arg in args]
        plains = getattr(text.plain, name)(*given, **{key: _plain(value) for key, value in options.items()})
        separator = options.get("sep", given[0] if given else None)
        fixed = len(separator) if isinstance(separator, str) and "partition" not in name else None
        pieces = text.pieces(plains, 0 if "partition" in name else fixed)
        return tuple(pieces) if isinstance(plains, tuple) else pieces

    return split


def _cases(name: str) -> Callable[..., Any]:
    """A method that changes letters: into some that have marks, perhaps."""
    return lambda text: text.marks.mark(getattr(text.plain, name)())


class Literal(str):
    """Marked text. What a template asks of it, it is asked of the plain text; what it cuts, keeps its marks."""

    plain: str
    marks: Marks

    def __new__(cls, marked: str, plain: str, marks: Marks) -> Literal:
        """`marked` is as long as `plain`."""
        made = super().__new__(cls, marked)
        made.plain, made.marks = plain, marks
        return made

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self.plain)

    def __eq__(self, other: object) -> bool:
        return bool(self.plain == _plain(other))

    def __ne__(self, other: object) -> bool:
        return bool(self.plain != _plain(other))

    def __lt__(self, other: str) -> bool:
        return bool(self.plain < _plain(other))

    def __gt__(self, other: str) -> bool:
        return bool(self.plain > _plain(other))

    def __contains__(self, part: object) -> bool:
        return bool(_plain(part) in self.plain)

    def __getitem__(self, key: SupportsIndex | slice) -> Literal:
        return Literal(super().__getitem__(key), self.plain[key], self.marks)

    def __add__(self, other: str) -> Literal:
        return Literal(super().__add__(other), self.plain + self.marks.unmark(other), self.marks)

    def __radd__(self, other: str) -> Literal:
        return Literal(other.__add__(self), self.marks.unmark(other) + self.plain, self.marks)

    startswith, endswith, count = _asks("startswith"), _asks("endswith"), _asks("count")
    find, rfind, index, rindex = _asks("find"), _asks("rfind"), _asks("index"), _asks("rindex")
    isalpha, isalnum, isdigit, isspace = _asks("isalpha"), _asks("isalnum"), _asks("isdigit"), _asks("isspace")
    isdecimal, isnumeric, islower, isupper = _asks("isdecimal"), _asks("isnumeric"), _asks("islower"), _asks("isupper")
    strip, lstrip, rstrip = _strips("strip"), _strips("lstrip"), _strips("rstrip")
    removeprefix, removesuffix = _strips("removeprefix"), _strips("removesuffix")
    split, rsplit, splitlines = _splits("split"), _splits("rsplit"), _splits("splitlines")
    partition, rpartition = _splits("partition"), _splits("rpartition")
    lower, upper, title, capitalize = _cases("lower"), _cases("upper"), _cases("title"), _cases("capitalize")

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """As a string's own."""
        if not old:
            return str.replace(self, old, new, count)
        plain = self.plain.replace(_plain(old), self.marks.unmark(new), count)
        return Literal(str.join(new, self.split(old, count)), plain, self.marks)

    def pieces(self, plains: Iterable[str], gap: int | None) -> list[str]:
        """The pieces that are `plains` in plain text, in order; `gap` characters apart, or as many as it takes."""
        found: list[str] = []
        at = 0
        for plain in plains:
            at = self.plain.index(plain, at) if gap is None else at
            found.append(self[at : at + len(plain)])
            at += len(plain) + (gap or 0)
        return found
