"""An answer's text to what a chat reply shows: reasoning, content and tool calls, whose tags go by token id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from divisi.deploy.api.schema.replies import FinishReason
from divisi.model.text.reasoning import ReasoningSplitter
from divisi.model.text.tags import Segment, Tag, TagMarks
from divisi.model.text.tool_calls import Part, TextPart, ToolCallParser


@dataclass(frozen=True, slots=True)
class ParseRule:
    """What to look for in an answer."""

    tags: Mapping[int, str]
    """Names of the tags by token id."""
    thinks: bool
    """Whether it may have a thinking part."""
    opened: bool
    """Whether the prompt ends inside it."""
    names: frozenset[str]
    """Functions that may be called; empty where none may."""
    single: bool
    """Whether the answer ends with its first call."""
    forced: bool = False
    """Whether a grammar holds the answer to calls."""


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Text of the thinking part."""

    text: str


ChatPart = ReasoningPart | Part


class ChatParser:
    """Follows one answer: each token as it is generated, and its text as it is let out, which may be later.

    The parts, joined, don't depend on how the text comes.
    """

    def __init__(self, rule: ParseRule) -> None:
        self._tags = rule.tags
        self._marks = TagMarks()
        self._splitter = ReasoningSplitter(opened=rule.opened) if rule.thinks else None
        # Counts on the text as generated: a stop string that is held back would shift the count.
        self._counter = ReasoningSplitter(opened=rule.opened) if rule.thinks else None
        self._uncounted = 0
        self._calls = ToolCallParser(rule.names, single=rule.single) if rule.names else None
        self._forced = rule.forced

    @property
    def done(self) -> bool:
        """Whether the answer is over: it has the one call that it may have."""
        return self._calls is not None and self._calls.done

    def push(self, text: str) -> list[ChatPart]:
        """What a piece of text adds; `see` has had its tokens."""
        if not text:
            return []
        return self._parts(self._marks.cut(text))

    def finish(self, reason: FinishReason | None = None) -> list[ChatPart]:
        """What was held back, at the end of the text, which came for `reason`."""
        rest = self._marks.rest()
        parts = self._parts([rest] if rest else [])
        if self._splitter is not None:
            reasoning, content = self._splitter.finish()
            parts += [*([ReasoningPart(reasoning)] if reasoning else []), *self._content(content)]
        if self._calls is not None:
            parts += self._calls.finish(cut=self._forced and reason == "length")
        return parts

    def see(self, token_id: int, text: str) -> int:
        """Take note of one more token and the text that it completes.

        Returns how many tokens are found to be of the thinking part, its tags included.
        """
        if (name := self._tags.get(token_id)) is None:
            self._marks.see(text)
            return 0 if self._counter is None else self._count(self._counter, text)
        shown = name if text.endswith(name) else ""
        before, tag = text.removesuffix(shown), Tag(name, shown)  # the token may end a broken character, too
        self._marks.see(before)
        self._marks.see(tag)
        return 0 if self._counter is None else self._count(self._counter, before, tag)

    def _count(self, counter: ReasoningSplitter, *segments: Segment) -> int:
        for segment in segments:
            counter.push(segment)
        self._uncounted += 1
        if not counter.thinking and not counter.closed and not counter.answering:
            return 0  # neither part has begun yet
        if not counter.thinking:
            self._counter = None
        found, self._uncounted = (0 if counter.answering and not counter.closed else self._uncounted), 0
        return found

    def reason(self, finish_reason: FinishReason) -> FinishReason:
        """`tool_calls` for an end after whole calls; a broken block leaves the reason that it had."""
        calls = self._calls
        called = calls is not None and calls.calls > 0 and not calls.broken
        return "tool_calls" if called and finish_reason == "stop" else finish_reason

    def _parts(self, segments: Iterable[Segment]) -> list[ChatPart]:
        if self._splitter is None or self._splitter.passes:
            return self._content(segments)
        parts: list[ChatPart] = []
        for segment in segments:
            reasoning, content = self._splitter.push(segment)
            if reasoning:
                parts.append(ReasoningPart(reasoning))
            if content:
                parts += self._content(content)
        return parts

    def _content(self, segments: Iterable[Segment]) -> list[ChatPart]:
        if self._calls is not None:
            parts: list[ChatPart] = []
            for segment in segments:
                parts += self._calls.push(segment)
            return parts
        texts = [segment.text if isinstance(segment, Tag) else segment for segment in segments]
        return [TextPart(text) for text in texts if text]
