"""Tool calls in an answer, in the Hermes form of this model family, found while the text grows.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A block that isn't exactly this (JSON that breaks, a function that wasn't offered, an end before its time) is text.
Inside of JSON that isn't whole yet a tag is a part of it, as in a string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from divisi.model.text.json_scan import JsonError, JsonScanner
from divisi.model.text.tags import CALL, CALL_END, Segment, Tag


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text beside the calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of call `index`. The first piece has the name; the arguments of all make the JSON text as written."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class RevokedPart:
    """Call `index`, of which pieces are out, is none: its block broke. The block follows as text."""

    index: int


Part = TextPart | CallPart | RevokedPart


class ToolCallParser:
    """Splits a growing text into text and calls. The parts, joined, don't depend on how the text is cut into pieces.

    Line ends around a block belong to the form and are dropped. After a broken block the text up to the next
    `</tool_call>` is text too, so that nothing inside it is taken for a call.
    """

    def __init__(self, names: Collection[str], *, single: bool = False) -> None:
        """`names`: the functions on offer. `single`: the text is over after the first whole call."""
        self._names = frozenset(names)
        self._single = single
        self._step: Callable[[Segment], None] = self._outside
        self._parts: list[Part] = []
        self._newlines = 0  # line ends that go out only if text follows them
        self._after_call = False
        self._opening = ""  # the opening tag's text
        self._block = _Block(self._names)
        self._index = 0
        self._started = False
        self.calls = 0
        """Whole calls so far."""
        self.broken = False
        """Whether a block was none."""
        self.done = False
        """With `single`: the first call is whole, and what follows is nothing."""

    def push(self, segment: Segment) -> list[Part]:
        """What a segment adds."""
        if not self.done:
            self._step(segment)
        return self._take_parts()

    def finish(self, *, cut: bool = False) -> list[Part]:
        """At the end of the text. JSON that is whole is a call even where `</tool_call>` is missing.

        `cut`: the text was held to calls and only ended before its time, so what there is of one stays one.
        """
        if self._step == self._inside:
            if self._block.whole:
                self._end_call()
            elif cut:
                self._cut_call()
            else:
                self._break()
        elif self._step == self._outside and not self.done:
            self._text("\n" * self._newlines)
            self._newlines = 0
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._parts and isinstance(last := self._parts[-1], TextPart):
            self._parts[-1] = TextPart(last.text + text)
        else:
            self._parts.append(TextPart(text))

    def _outside(self, segment: Segment) -> None:
        if isinstance(segment, str):
            self._release(segment)
        elif segment.name == CALL:
            self._opening = segment.text
            self._block, self._started, self._step = _Block(self._names), False, self._inside
        else:
            self._release(segment.text)

    def _release(self, text: str) -> None:
        """Text outside of blocks: out with it, but for the line ends at its end."""
        if self._after_call:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if body:
            self._text("\n" * self._newlines + body)
            self._newlines, self._after_call = 0, False
        if not self._after_call:
            self._newlines += len(text) - len(body)

    def _inside(self, segment: Segment) -> None:
        if isinstance(segment, Tag) and segment.name == CALL_END and self._block.whole:
            self._end_call()
            return
        text = segment.name if isinstance(segment, Tag) else segment
        for position, char in enumerate(text):
            try:
                self._block.push(char)
            except JsonError:
                self._block.raw.append(text[:position])
                self._take_arguments()  # as they would be out, had the text come character by character
                self._break()
                self._skipping(segment if isinstance(segment, Tag) else text[position:])  # a tag breaks it as a whole
                return
        self._block.raw.append(text)
        self._take_arguments()

    def _take_arguments(self) -> None:
        if arguments := self._block.take_arguments():
            self._parts.append(CallPart(self._index, None if self._started else self._block.name, arguments))
            self._started = True

    def _end_call(self) -> None:
        self._take_arguments()
        self.calls += 1
        self._index += 1
        self._newlines, self._after_call = 0, True
        self._step = self._outside
        self.done = self._single

    def _cut_call(self) -> None:
        if not self._started and self._block.name is not None:
            self._parts.append(CallPart(self._index, self._block.name, self._block.take_arguments()))
        self._step = self._outside

    def _break(self) -> None:
        self.broken = True
        if self._started:
            self._parts.append(RevokedPart(self._index))
            self._index += 1
        self._text("\n" * self._newlines + self._opening + "".join(self._block.raw))
        self._newlines, self._after_call = 0, False
        self._step = self._skipping

    def _skipping(self, segment: Segment) -> None:
        if isinstance(segment, str):
            self._text(segment)
            return
        self._text(segment.text)
        if segment.name == CALL_END:
            self._step = self._outside


class _Block:
    """What stands between the tags: an object of exactly `name` and `arguments`, in either order."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._state: Callable[[str], None] = self._before
        self._scanner = JsonScanner()
        self._string: list[str] = []
        self._key = ""
        self._left = {"name", "arguments"}
        self._arguments: list[str] = []
        self.name: str | None = None
        self.raw: list[str] = []
        """The text so far, kept by the parser."""
        self.whole = False
        """The object has ended."""

    def push(self, char: str) -> None:
        """Take one character; JsonError where this is no call."""
        self._state(char)

    def take_arguments(self) -> str:
        """Text of the arguments since the last time; empty until the name is known."""
        if self.name is None:
            return ""
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def _before(self, char: str) -> None:
        if char == "{":
            self._state = self._before_key
        elif not char.isspace():
            raise JsonError(f"no object begins with {char!r}")

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._scan(char, self._in_key)
        elif not char.isspace():
            raise JsonError(f"no key begins with {char!r}")

    def _scan(self, char: str, state: Callable[[str], None]) -> None:
        self._scanner, self._string, self._state = JsonScanner(), [], state
        state(char)

    def _in_string(self, char: str) -> str | None:
        """The string, once it has ended."""
        self._scanner.push(char)
        self._string.append(char)
        return json.loads("".join(self._string)) if self._scanner.complete else None

    def _in_key(self, char: str) -> None:
        key = self._in_string(char)
        if key is None:
            return
        if key not in self._left:
            raise JsonError(f"the key {key!r} isn't expected")
        self._left.remove(key)
        self._key, self._state = key, self._colon

    def _colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif not char.isspace():
            raise JsonError(f"a colon is missing before {char!r}")

    def _before_value(self, char: str) -> None:
        if self._key == "name" and char == '"':
            self._scan(char, self._in_name)
        elif self._key == "arguments" and char == "{":
            self._scan(char, self._in_arguments)
        elif not char.isspace():
            raise JsonError(f"{self._key} cannot begin with {char!r}")

    def _in_name(self, char: str) -> None:
        name = self._in_string(char)
        if name is None:
            return
        if name not in self._names:
            raise JsonError(f"there is no function {name!r}")
        self.name, self._state = name, self._after_value

    def _in_arguments(self, char: str) -> None:
        self._scanner.push(char)
        self._arguments.append(char)
        if self._scanner.complete:
            self._state = self._after_value

    def _after_value(self, char: str) -> None:
        if char == "," and self._left:
            self._state = self._before_key
        elif char == "}" and not self._left:
            self.whole, self._state = True, self._after_object
        elif not char.isspace():
            raise JsonError(f"the call cannot go on with {char!r}")

    def _after_object(self, char: str) -> None:
        if not char.isspace():
            raise JsonError(f"{CALL_END} is missing before {char!r}")
