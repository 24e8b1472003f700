"""Tags of an answer: tokens of their own that open and close its parts. The same letters in other tokens are text."""

from __future__ import annotations

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


def last_tag(
    prompt: Sequence[int], tokenizer: Tokenizer, tags: Mapping[int, str], *, past_text: bool = False
) -> str | None:
    """The tag that a prompt ends with, but for blanks after it; with `past_text`, the last one of its last turn."""
    for token_id in reversed(prompt):
        if token_id in tags:
            return tags[token_id]
        passes = token_id not in tokenizer.special_ids if past_text else not tokenizer.bytes_of(token_id).strip()
        if not passes:
            return None
    return None
