"""One grammar for a whole answer: the thinking part, then tool calls or content, each held to its own form.

Tags go by token id. No other part of an answer can hold such a token: there the letters of a tag are spelled out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from divisi.model.text.tags import CALL, CALL_END, THINK, THINK_END

_TEXT = "TEXT: /(.|\\n)*/"
_CONTENT = "content"
# JSON as json.dumps writes it: what templates show and models were trained on, and no room for endless whitespace
_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class ThinkingRule:
    """How the answer thinks. `opened`: it begins inside the thinking part; otherwise it may open one."""

    opened: bool
    budget: int | None = None
    """Tokens of thinking after which the part is closed; None for as many as it takes."""


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A function that may be called. `name` needs no escaping in JSON."""

    name: str
    parameters: Mapping[str, Any] | None = None
    """JSON schema that the arguments must follow; None for any object."""


@dataclass(frozen=True, slots=True)
class CallRule:
    """Which calls the answer may hold: `forced` for one or more and nothing else, `single` for one at most."""

    tools: tuple[OfferedTool, ...]
    forced: bool
    single: bool


def answer_grammar(
    tags: Mapping[str, int],
    *,
    thinking: ThinkingRule | None = None,
    calls: CallRule | None = None,
    content: str | None = None,
) -> str:
    """An llguidance grammar. `tags`: their token ids by name, of as many as the rules need.

    `content`: the grammar, of any kind, of an answer without calls; None for free text.
    """
    rules = ["%llguidance {}", _TEXT, "GAP: /\\n{0,2}/"]
    start = "answer"
    if thinking is not None:
        rules += _thinking_rules(tags, thinking)
        start = "thinking answer"
    free = "TEXT" if content is None else f"@{_CONTENT}"
    if calls is None:
        rules.append(f"answer: {free}")
    else:
        rules += _call_rules(tags, calls, free, formed=content is not None)
    lark = "\n".join([rules[0], f"start: {start}", *rules[1:]]) + "\n"
    uses_content = content is not None and not (calls is not None and calls.forced)
    inner = _named(content, _CONTENT) if content is not None and uses_content else []
    return json.dumps({"grammars": [{"lark_grammar": lark}, *inner]})


def _thinking_rules(tags: Mapping[str, int], rule: ThinkingRule) -> list[str]:
    part = "" if rule.budget == 0 else "thought "
    limit = "" if rule.budget is None else f"[max_tokens={rule.budget}]"
    rules = [] if rule.budget == 0 else [f"thought{limit}: TEXT"]
    body = f"{part}<[{tags[THINK_END]}]> GAP"
    return [*rules, f"thinking: {body}" if rule.opened else f"thinking: (<[{tags[THINK]}]> {body})?"]


def _call_rules(tags: Mapping[str, int], rule: CallRule, free: str, *, formed: bool) -> list[str]:
    names = [f"tool_{index}" for index in range(len(rule.tools))]
    bodies = [f"{name}: {_body(tool)}" for name, tool in zip(names, rule.tools, strict=True)]
    call = f'call: <[{tags[CALL]}]> "\\n" ({" | ".join(names)}) "\\n" <[{tags[CALL_END]}]>'
    several = "" if rule.single else ' ("\\n" call)*'
    if rule.forced:
        answer = f"answer: call{several}"
    elif formed:  # text that must follow a grammar cannot stand beside calls
        answer = f"answer: call{several} | {free}"
    elif rule.single:
        answer = f"answer: {free} (call)?"
    else:
        answer = f"answer: ({free} call)* {free}"
    return [answer, call, *bodies]


def _body(tool: OfferedTool) -> str:
    schema: dict[str, Any] = {"type": "object"} if tool.parameters is None else dict(tool.parameters)
    schema.setdefault("type", "object")  # arguments are one, and the parser takes nothing else
    schema["x-guidance"] = _AS_TRAINED
    head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    return f'{head} %json {json.dumps(schema)} "}}"'


def _named(grammar: str, name: str) -> list[dict[str, Any]]:
    """A grammar's parts, the first under `name`; plain text is a Lark grammar."""
    if not grammar.lstrip().startswith("{"):
        return [{"name": name, "lark_grammar": grammar}]
    parts: list[dict[str, Any]] = json.loads(grammar)["grammars"]
    return [{**parts[0], "name": name}, *parts[1:]]
