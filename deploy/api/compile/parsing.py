"""An answer's text to what a chat reply shows: reasoning, content and tool calls, whose tags go by token id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from divisi.deploy.api.schema.replies import FinishReason
from divisi.model.text.reasoning import ReasoningSplitter
from divisi.model.text.tags import Segment, Tag
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
    """Follows one answer, token by token. The parts, joined, don't depend on how tokens come grouped."""

    def __init__(self, rule: ParseRule) -> None:
        self._tags = rule.tags
        self._splitter = ReasoningSplitter(opened=rule.opened) if rule.thinks else None
        self._calls = ToolCallParser(rule.names, single=rule.single) if rule.names else None
        self._forced = rule.forced
        self._uncounted: int | None = 0 if rule.thinks else None  # None once all tokens of the thinking are counted

    @property
    def done(self) -> bool:
        """Whether the answer is over: it has the one call that it may have."""
        return self._calls is not None and self._calls.done

    def push(self, token_id: int, text: str) -> list[ChatPart]:
        """What a token adds; `text` is what it completes."""
        if (name := self._tags.get(token_id)) is None:
            return self._parts([text]) if text else []
        shown = name if text.endswith(name) else ""
        before = text.removesuffix(shown)  # the token may end a broken character, too
        return self._parts([before, Tag(name, shown)] if before else [Tag(name, shown)])

    def finish(self, rest: str, reason: FinishReason | None = None) -> list[ChatPart]:
        """At the end of the text, whose last piece is `rest` and which came for `reason`: that, and what was held."""
        parts = self._parts([rest] if rest else [])
        if self._splitter is not None:
            reasoning, content = self._splitter.finish()
            parts += [*([ReasoningPart(reasoning)] if reasoning else []), *self._content(content)]
        if self._calls is not None:
            parts += self._calls.finish(cut=self._forced and reason == "length")
        return parts

    def count_reasoning(self) -> int:
        """To be called after each token: how many are found to be of the thinking part, its tags included."""
        if self._uncounted is None or self._splitter is None:
            return 0
        splitter, count = self._splitter, self._uncounted + 1
        if not splitter.thinking and not splitter.answering:
            self._uncounted = count  # neither part has begun yet
            return 0
        self._uncounted = 0 if splitter.thinking else None
        return count if splitter.thinking or splitter.closed else 0

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
