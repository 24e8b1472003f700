"""What the streams ask for: each kind of answer that a lost process could disturb, at least 400 tokens long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOKENS = 420
_MODEL = {"model": "divisi-demo", "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
_OPENINGS = (
    "Once upon a time in a small harbour",
    "The list of everything that was in the box:",
    "Dear Anna, yesterday I went to the market and",
)
_WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "harbour")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. `path` is below /v1/."""

    name: str
    path: str
    body: dict[str, Any]
    greedy: bool = False
    """Whether its tokens are the likeliest ones, by no other rule."""


def asks(openings: int, tokens: int = TOKENS) -> list[Ask]:
    """Of each kind one with every opening, the kinds by turns; a stop string has to be found first, see `stopping`.

    Answers have `tokens` tokens and more.
    """
    return [ask for number in range(openings) for ask in _kinds(number, tokens)]


def _kinds(number: int, tokens: int) -> list[Ask]:
    opening = _OPENINGS[number]
    text = {"prompt": opening, "max_tokens": tokens, "ignore_eos": True}
    sampled = {"temperature": 0.8, "top_p": 0.95, "seed": 100 + number}
    penalties = {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}
    chat = {"messages": [{"role": "user", "content": f"{opening}: tell me more."}]}
    return [
        _ask("greedy", number, "completions", text | {"temperature": 0}, greedy=True),
        _ask("sampled", number, "completions", text | sampled),
        _ask("two", number, "completions", text | sampled | {"n": 2}),
        _ask("grammar", number, "chat/completions", chat | sampled | _letters(tokens)),
        _ask("tool call", number, "chat/completions", chat | sampled | _call(tokens)),
        _ask("penalties", number, "completions", text | sampled | penalties),
        _ask("logprobs", number, "completions", text | {"temperature": 0, "logprobs": 3}, greedy=True),
        _ask("drafts", number, "completions", text | sampled | {"mtp": {"max_draft_tokens": 3}}),
        _ask("stop", number, "completions", text | sampled | {"seed": 200 + number, "max_tokens": 2 * tokens}),
    ]


def _letters(tokens: int) -> dict[str, Any]:
    return {"structured_outputs": {"regex": "[a-z ,.]+"}, "min_tokens": tokens, "max_tokens": tokens}


def _call(tokens: int) -> dict[str, Any]:
    """Its arguments have to be that long: a word and its quotes are four tokens and more."""
    count = tokens // 4 + 1
    words = {"type": "array", "items": {"enum": list(_WORDS)}, "minItems": count, "maxItems": count}
    parameters = {
        "type": "object", "properties": {"words": words}, "required": ["words"], "additionalProperties": False,
    }  # fmt: skip
    return {
        "tools": [{"type": "function", "function": {"name": "note", "parameters": parameters}}],
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        "max_tokens": 5 * tokens,
    }


def _ask(kind: str, number: int, path: str, body: dict[str, Any], *, greedy: bool = False) -> Ask:
    drafts = {} if kind == "drafts" else {"mtp": {"max_draft_tokens": 1}}
    return Ask(f"{kind} {number}", path, _MODEL | drafts | body, greedy)


def stopping(ask: Ask, text: str) -> Ask:
    """The same with a stop string: a piece of its answer `text` that comes late, in the second half, and once."""
    least = len(text) // 2
    for start in range(least, len(text) - 12):
        piece = text[start : start + 12]
        if text.find(piece) == start and piece.isascii():
            return Ask(ask.name, ask.path, ask.body | {"stop": [piece]})
    raise ValueError(f"{ask.name}: nothing in its answer comes late and once: take another seed")
