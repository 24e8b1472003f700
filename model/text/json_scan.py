"""A recogniser of JSON that comes character by character."""

from __future__ import annotations

import re
from collections.abc import Callable

MAX_DEPTH = 64
"""Deepest nesting that is taken; deeper JSON makes many readers overflow their stack."""

_SPACE = " \t\n\r"
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonError(ValueError):
    """The text so far begins no JSON value."""


class JsonScanner:
    """Follows one JSON string, object or array (RFC 8259); `complete` after its last character.

    A number or word at the outermost level is refused: where it ends depends on what follows.
    """

    def __init__(self) -> None:
        self.complete = False
        self._stack: list[str] = []
        self._state: Callable[[str], None] = self._value
        self._is_key = False
        self._scalar: list[str] = []
        self._hex_left = 0

    def push(self, char: str) -> None:
        """Take one character; JsonError where no JSON value goes on with it."""
        self._state(char)

    def _value(self, char: str) -> None:
        if char in _SPACE:
            return
        if char == '"':
            self._is_key = False
            self._state = self._string
        elif char in "{[":
            if len(self._stack) >= MAX_DEPTH:
                raise JsonError(f"nested deeper than {MAX_DEPTH}")
            self._stack.append(char)
            self._state = self._first_key if char == "{" else self._first_item
        elif self._stack and char in _SCALAR_CHARS:
            self._scalar = [char]
            self._state = self._in_scalar
        else:
            raise JsonError(f"a value cannot begin with {char!r}")

    def _value_ended(self) -> None:
        self.complete = not self._stack
        self._state = self._after_value if self._stack else self._nothing

    def _string(self, char: str) -> None:
        if char == '"':
            if self._is_key:
                self._state = self._colon
            else:
                self._value_ended()
        elif char == "\\":
            self._state = self._escape
        elif char < " ":
            raise JsonError("a control character in a string")

    def _escape(self, char: str) -> None:
        if char == "u":
            self._hex_left = 4
            self._state = self._unicode
        elif char in '"\\/bfnrt':
            self._state = self._string
        else:
            raise JsonError(f"no escape is \\{char}")

    def _unicode(self, char: str) -> None:
        if char not in _HEX:
            raise JsonError(f"{char!r} is no hexadecimal digit")
        self._hex_left -= 1
        if not self._hex_left:
            self._state = self._string

    def _in_scalar(self, char: str) -> None:
        if char in _SCALAR_CHARS:
            self._scalar.append(char)
        elif _SCALAR.fullmatch(word := "".join(self._scalar)):
            self._state = self._after_value
            self._after_value(char)
        else:
            raise JsonError(f"{word[:32]!r} is no value")

    def _first_key(self, char: str) -> None:
        if char == "}":
            self._close(char)
        else:
            self._key(char)

    def _key(self, char: str) -> None:
        if char == '"':
            self._is_key = True
            self._state = self._string
        elif char not in _SPACE:
            raise JsonError(f"a key cannot begin with {char!r}")

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._value
        elif char not in _SPACE:
            raise JsonError(f"a colon is missing before {char!r}")

    def _first_item(self, char: str) -> None:
        if char == "]":
            self._close(char)
        elif char not in _SPACE:
            self._value(char)

    def _after_value(self, char: str) -> None:
        if char == ",":
            self._state = self._key if self._stack[-1] == "{" else self._value
        elif char in "}]":
            self._close(char)
        elif char not in _SPACE:
            raise JsonError(f"a comma is missing before {char!r}")

    def _close(self, char: str) -> None:
        if self._stack.pop() + char not in ("{}", "[]"):
            raise JsonError(f"{char!r} closes what wasn't opened")
        self._value_ended()

    def _nothing(self, char: str) -> None:
        raise JsonError(f"{char!r} after the end")
