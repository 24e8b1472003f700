"""A conversation to token ids: of what its messages say, nothing becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from divisi.model.text.errors import TemplateError
from divisi.model.text.literal import Literal, Marks
from divisi.model.text.tags import TAGS
from divisi.model.text.template import ChatTemplate
from divisi.model.text.tokenizer import Tokenizer

_TAGS = re.compile(f"({'|'.join(TAGS)})")


class Rendered(NamedTuple):
    """A conversation as the template writes it."""

    text: str
    marked: str
    """The same, with marks in place of the letters that are not the template's own."""


class ConversationEncoder:
    """Renders and encodes conversations; safe to call from several threads."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, *, literal: bool = True) -> None:
        """`literal`: whether added tokens in the conversation's own text are text, not control tokens."""
        self._template = template
        self._tokenizer = tokenizer
        self._literal = literal

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        continued: bool = False,
    ) -> Rendered:
        """The prompt of a conversation; `continued`: the answer goes on with its last message, which keeps its tags.

        Raises TemplateError.
        """
        render = self._template.render_continued if continued else self._template.render
        text = render(messages, **{**arguments, "add_generation_prompt": add_generation_prompt})
        if not self._literal:
            return Rendered(text, text)
        marks = Marks(self._tokenizer.letters_of_controls(text), text)
        marked_arguments = {**marks.mark(arguments), "add_generation_prompt": add_generation_prompt}
        try:
            marked = render(_marked(messages, marks, continued=continued), **marked_arguments)
        except TemplateError:
            if self._mentions_controls([messages, arguments]):
                raise
            return Rendered(text, text)
        unmarked = marks.unmark(marked)
        if unmarked == text:
            return Rendered(text, marked)
        # The template did with the text what a mark doesn't survive, or it tells the time.
        harmless = self._tokenizer.controls(text).names == self._tokenizer.controls(marked).names
        if harmless and not self._mentions_controls([messages, arguments]):
            return Rendered(text, text)
        return Rendered(unmarked, marked)

    def encode(self, rendered: Rendered, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered conversation."""
        return self._tokenizer.encode_marked(rendered.text, rendered.marked, add_special_tokens=add_special_tokens)

    def _mentions_controls(self, value: Any) -> bool:
        if isinstance(value, str):
            return bool(self._tokenizer.controls(value).names)
        if isinstance(value, Mapping):
            return self._mentions_controls([*value.keys(), *value.values()])
        return isinstance(value, (list, tuple)) and any(map(self._mentions_controls, value))


def _marked(messages: Sequence[Mapping[str, Any]], marks: Marks, *, continued: bool) -> list[dict[str, Any]]:
    """Messages whose text is literal, but for the roles."""
    try:
        found = [{**marks.mark(message), "role": message.get("role")} for message in messages]
    except RecursionError:
        raise TemplateError("a message is nested too deep; flatten the arguments of its calls") from None
    if continued and isinstance(said := messages[-1].get("content"), str):
        pieces = [piece if piece in TAGS else marks.mark(piece) for piece in _TAGS.split(said)]
        found[-1]["content"] = Literal("".join(pieces), said, marks)
    return found
