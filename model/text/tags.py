"""Tags of an answer: tokens of their own that open and close its parts. The same letters in other tokens are text."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from divisi.model.text.tokenizer import Tokenizer

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TAGS = (THINK, THINK_END, CALL, CALL_END)


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag where it stands in an answer."""

    name: str
    text: str
    """What it adds to the text: its name, or nothing where special tokens are not shown."""


Segment = str | Tag


def tag_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Token ids of the tags that the vocabulary has, by name."""
    found = {name: tokenizer.id_of(name) for name in TAGS}
    return {name: token_id for name, token_id in found.items() if token_id is not None}


def last_tag(prompt: Sequence[int], tokenizer: Tokenizer, tags: Mapping[int, str]) -> str | None:
    """The tag that a prompt ends with, but for blanks after it."""
    for token_id in reversed(prompt):
        if token_id in tags:
            return tags[token_id]
        if tokenizer.bytes_of(token_id).strip():
            return None
    return None


class TagMarks:
    """Remembers where in an answer its tags stand, for text that is let out later than its tokens came."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, Tag]] = deque()  # by the offset at which each begins
        self._seen = 0  # characters generated
        self._at = 0  # characters let out before `_held`
        self._held = ""  # the beginning of a tag's letters

    def see(self, segment: Segment) -> None:
        """Take note of what was generated."""
        if isinstance(segment, str):
            self._seen += len(segment)
            return
        self._marks.append((self._seen, segment))
        self._seen += len(segment.text)

    def cut(self, text: str) -> list[Segment]:
        """The next piece of the text that was seen, with its tags; one whose letters are cut waits for the others."""
        if not self._marks:
            self._at += len(text)
            return [text] if text else []
        text, self._held = self._held + text, ""
        segments: list[Segment] = []
        while self._marks:
            begin, tag = self._marks[0]
            before = begin - self._at
            if before > len(text):
                break
            if before:
                segments.append(text[:before])
            text, self._at = text[before:], begin
            if len(tag.text) > len(text):
                self._held = text
                return segments
            segments.append(tag)
            text, self._at = text[len(tag.text) :], begin + len(tag.text)
            self._marks.popleft()
        self._at += len(text)
        return [*segments, text] if text else segments

    def rest(self) -> str:
        """At the end of the text: letters of a tag that was cut, which are text."""
        held, self._held = self._held, ""
        return held
